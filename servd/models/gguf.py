"""Checkpoints in a GGUF file, memory-mapped, through the tensor index that the hub wrote beside it.

Knows llama.cpp's tensor names and its reordering of q and k; nothing of layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor

from servd.errors import ConfigError
from servd.models.ggml_types import GGML_TYPES, dequantize, read_codes
from servd.models.weight_files import WeightFiles
from servd.quant.codes import fieldwise

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PATTERN = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str  # Hugging Face's where there is one, else the file's own
    ggml_name: str
    ggml_type: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


def huggingface_name(ggml_name: str) -> str:
    """Hugging Face's name of a tensor; names that have none come back unchanged."""
    stem, _, kind = ggml_name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    match = _LAYER_PATTERN.fullmatch(ggml_name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return ggml_name


class GGUFFile(WeightFiles):
    """One .gguf file. Quantized types become floats as they are read, or codes where the reader takes those."""

    def __init__(self, path: Path, tensor_index: Path, *, permuted_heads: Mapping[str, int]) -> None:
        """`permuted_heads`: last parts of projection names whose rows were reordered → their number of heads.

        Raises ConfigError if the index or the file cannot be read.
        """
        self._path = path
        self._permuted_heads = permuted_heads
        try:
            self._entries = [_entry(row) for row in json.loads(tensor_index.read_text(encoding="utf-8"))]
            # Copy-on-write only so that torch takes the pages without a warning: nothing writes to them.
            self._data = numpy.memmap(path, dtype=numpy.uint8, mode="c")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} with tensor index {tensor_index} cannot be read: {error}") from None

    def names(self) -> list[str]:
        return [entry.name for entry in self._entries]

    def stored_dtype(self) -> torch.dtype:
        """The type of the matrices; bfloat16 if any is quantized."""
        types = {GGML_TYPES[e.ggml_type].dtype for e in self._entries if len(e.shape) > 1 and e.ggml_type in GGML_TYPES}
        (only,) = types if len(types) == 1 else (None,)
        return only or torch.bfloat16

    @property
    def is_quantized(self) -> bool:
        return any(e.ggml_type in GGML_TYPES and GGML_TYPES[e.ggml_type].coding is not None for e in self._entries)

    def tensors(self, dtype: torch.dtype, coded: Container[str] = ()) -> Iterator[tuple[str, Tensor | GroupedWeight]]:
        for entry in self._entries:
            try:
                tensor = self._read(entry, dtype, entry.name in coded)
            except ConfigError as error:
                raise ConfigError(f"tensor {entry.ggml_name} of {self._path}: {error.message}") from None
            yield entry.name, tensor

    def _read(self, entry: _Entry, dtype: torch.dtype, is_coded: bool) -> Tensor | GroupedWeight:
        raw = torch.from_numpy(self._data[entry.offset : entry.offset + entry.nbytes])
        weight = read_codes(raw, entry.ggml_type, entry.shape) if is_coded else None
        if weight is None:
            return self._restore_order(entry.name, dequantize(raw, entry.ggml_type, entry.shape, dtype))
        return fieldwise(lambda tensor: self._restore_order(entry.name, tensor), weight)

    def _restore_order(self, name: str, tensor: Tensor) -> Tensor:
        """Undo llama.cpp's reordering of rows: it interleaves the two halves of each head's."""
        heads = self._permuted_heads.get(name.split(".")[-2])
        if heads is None or tensor.shape[0] % (2 * heads):  # a wrong shape is reported where it is loaded
            return tensor
        pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _entry(row: Mapping[str, object]) -> _Entry:
    name, ggml_type, shape, offset, nbytes = (row[key] for key in ("name", "ggml_type", "shape", "offset", "nbytes"))
    if not (isinstance(name, str) and isinstance(shape, list) and isinstance(offset, int) and isinstance(nbytes, int)):
        raise ValueError(f"malformed row {row!r}")
    return _Entry(huggingface_name(name), name, str(ggml_type), tuple(shape), offset, nbytes)
