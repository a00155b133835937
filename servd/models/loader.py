"""Files to a model that is ready to run: dtype, architecture, every tensor to its layer.

Knows nothing of devices' memory, KV caches or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor

from servd.distributed.group import TPGroup
from servd.errors import ConfigError
from servd.layers.base import LayerContext, WeightSlot
from servd.models.base import MODELS, Model
from servd.models.decoder import read_int
from servd.models.gguf import GGUFFile
from servd.models.safetensors import SafetensorsFiles
from servd.models.weight_files import WeightFiles
from servd.quant.base import QUANT_METHODS, QuantMethod

if TYPE_CHECKING:
    from servd.hub.files import ModelFiles  # the control plane's: only its shape is used here

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES_SHOWN = 5
# Old checkpoints hold this derived table; it is computed anew.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


def load_model(
    files: ModelFiles,
    *,
    dtype: str,
    device: str,
    quantization: str = "auto",
    group: TPGroup | None = None,
    deterministic: bool = True,
    progress: Progress | None = None,
) -> Model:
    """Build the model that config.json names, and load this rank's part of its weights.

    `dtype`: float32, bfloat16, float16, or auto (the checkpoint's own; bfloat16 for quantized GGUF).
    `quantization`: how weights are held and multiplied, a member of QUANT_METHODS, or auto: `none` for a checkpoint of
    plain floats, for float32 and on a GPU; otherwise what the catalogue recommends, else `stored`.
    `deterministic`: a request's bits do not depend on the batch; otherwise a library's routines may serve.
    `progress("loading weights", tensors done, tensors in all)` is called after every tensor.
    Raises ConfigError naming the field, file or tensor that is wrong.
    """
    config = files.config()
    _refuse_foreign_codes(config)
    model_class = MODELS.get(_architecture(config))
    weight_files = _open_weights(files, config, model_class)
    compute_dtype = _resolve_dtype(dtype, config, weight_files)
    context = LayerContext(
        dtype=compute_dtype,
        device=torch.device(device),
        group=group or TPGroup.single(),
        quant_method=_quant_method(quantization, files.recommended_quantization, weight_files, compute_dtype, device),
        deterministic=deterministic,
    )
    model = model_class(config, context)
    _load_weights(model, weight_files, progress)
    model.finish_loading()
    return model


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        known = ", ".join(MODELS.discover())
        raise ConfigError(f"architectures in config.json is {architectures!r}; allowed: a list of one of {known}")
    return architectures[0]


def _open_weights(files: ModelFiles, config: Mapping[str, Any], model_class: type[Model]) -> WeightFiles:
    def is_all(suffix: str) -> bool:
        return bool(files.weights) and all(Path(path).suffix == suffix for path in files.weights)

    if is_all(".safetensors"):
        return SafetensorsFiles(files.weights)
    if is_all(".gguf") and len(files.weights) == 1 and files.tensor_index is not None:
        permuted_heads = {}
        if model_class.gguf_permutes_qk:
            num_heads = read_int(config, "num_attention_heads")
            permuted_heads = {"q_proj": num_heads, "k_proj": read_int(config, "num_key_value_heads", num_heads)}
        return GGUFFile(files.weights[0], files.tensor_index, permuted_heads=permuted_heads)
    names = ", ".join(path.name for path in files.weights) or "nothing"
    raise ConfigError(
        f"weights are {names}; allowed: .safetensors files or one indexed .gguf file "
        "(pickle checkpoints are refused: loading one can run any code)"
    )


def _resolve_dtype(dtype: str, config: Mapping[str, Any], weight_files: WeightFiles) -> torch.dtype:
    if dtype == "auto":
        if isinstance(weight_files, GGUFFile):  # its config.json was made from metadata that names no dtype
            return weight_files.stored_dtype()
        stored = config.get("dtype") or config.get("torch_dtype")
        if stored is None:
            return weight_files.stored_dtype()
        dtype = str(stored).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _refuse_foreign_codes(config: Mapping[str, Any]) -> None:
    """Formats of the hub (awq, gptq, …): none is read yet, and --quantization does not turn one into another."""
    quantization = config.get("quantization_config")
    if quantization is not None:
        name = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ConfigError(
            f"quantization_config in config.json names quant_method {name!r}; allowed: checkpoints without one, of "
            "float32, bfloat16 or float16, or a .gguf file"
        )


def _quant_method(
    asked: str, recommended: str | None, weight_files: WeightFiles, dtype: torch.dtype, device: str
) -> type[QuantMethod]:
    if asked == "auto":
        # On a GPU nothing has been measured that would beat the compute dtype.
        is_plain = dtype == torch.float32 or not weight_files.is_quantized or torch.device(device).type != "cpu"
        asked = "none" if is_plain else recommended or "stored"
    return QUANT_METHODS.get(asked)


def _load_weights(model: Model, weight_files: WeightFiles, progress: Progress | None) -> None:
    slots = model.weight_slots()
    names = weight_files.names()
    _check_names(names, slots)
    coded = {name for name, slot in slots.items() if slot.load_codes is not None}
    for done, (name, tensor) in enumerate(weight_files.tensors(model.dtype, coded), start=1):
        if not name.endswith(_IGNORED_SUFFIX):
            _load(name, tensor, slots[name])
        if progress is not None:
            progress("loading weights", done, len(names))


def _load(name: str, tensor: Tensor | GroupedWeight, slot: WeightSlot) -> None:
    shape = tensor.shape if isinstance(tensor, Tensor) else tensor.codes.shape
    if tuple(shape) != slot.shape:
        raise ConfigError(f"tensor {name} has shape {list(shape)}; config.json asks for {list(slot.shape)}")
    try:
        if isinstance(tensor, Tensor):
            slot.load(tensor)
        else:
            assert slot.load_codes is not None, f"{name}: codes come only where they are asked for"
            slot.load_codes(tensor)
    except ConfigError as error:
        raise ConfigError(f"tensor {name}: {error.message}") from None


def _check_names(names: list[str], slots: Mapping[str, WeightSlot]) -> None:
    """Before any tensor is read: a wrong checkpoint of many gigabytes should fail at once."""
    held = set(names)
    missing = [name for name, slot in slots.items() if slot.required and name not in held]
    if missing:
        raise ConfigError(f"the checkpoint lacks {_listed(missing)}")
    unknown = [name for name in names if name not in slots and not name.endswith(_IGNORED_SUFFIX)]
    if unknown:
        raise ConfigError(f"the model has no place for {_listed(unknown)} of the checkpoint")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:_NAMES_SHOWN])}{more}"
