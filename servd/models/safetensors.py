"""Checkpoints in safetensors files, memory-mapped, one or several shards.

Knows nothing of models.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from servd.errors import ConfigError
from servd.models.weight_files import WeightFiles

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class SafetensorsFiles(WeightFiles):
    """Shards in order. Raises ConfigError naming the file if a header is damaged or a name occurs twice."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._shards = [(path, _open(path)) for path in paths]
        self._names: dict[str, Path] = {}
        for path, shard in self._shards:
            for name in shard.keys():
                if name in self._names:
                    raise ConfigError(f"tensor {name} is both in {self._names[name]} and in {path}")
                self._names[name] = path

    def names(self) -> list[str]:
        return list(self._names)

    def stored_dtype(self) -> torch.dtype:
        for _, shard in self._shards:
            for name in shard.keys():
                return _dtype_of(shard, name)
        return torch.float32

    @property
    def is_quantized(self) -> bool:
        return False

    def tensors(self, dtype: torch.dtype, coded: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        for path, shard in self._shards:
            for name in shard.keys():
                _dtype_of(shard, name)
                try:
                    yield name, shard.get_tensor(name)
                except (SafetensorError, OSError) as error:
                    raise ConfigError(f"tensor {name} of {path} cannot be read: {error}") from None


def _open(path: Path) -> Any:
    try:
        shard = safe_open(path, framework="pt", device="cpu")
        _check_names(path)
        return shard
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a usable safetensors file: {error}") from None


def _check_names(path: Path) -> None:
    """Raise ValueError for a name that occurs twice: `safe_open`, which has checked all else, takes either."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length), object_pairs_hook=_object_of_different_names)


def _object_of_different_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _dtype_of(shard: Any, name: str) -> torch.dtype:
    stored = shard.get_slice(name).get_dtype()
    if stored not in _DTYPES:
        # An integer or float8 weight means nothing without its scales.
        raise ConfigError(f"tensor {name} has dtype {stored}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[stored]
