"""Rotary position embedding: the table of cosines and sines, with the scalings of long-context models.

Knows nothing of q and k: a kernel applies the table. The formulas are those of transformers'
`modeling_rope_utils`, in the same order of operations, so that the tables agree to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from servd.errors import ConfigError
from servd.layers.base import Layer, WeightSlot


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """What a model's config.json says of its rotary embedding."""

    rope_type: str
    theta: float
    rotary_dim: int  # leading dimensions of a head that are rotated
    max_position_embeddings: int  # as in config.json, before scaling
    parameters: Mapping[str, Any]  # the scaling's own settings

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int, max_position_embeddings: int) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Raises ConfigError for an unknown scaling type, naming the known ones.
        """
        parameters: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(parameters, Mapping):
            raise ConfigError(f"rope_parameters is {parameters!r}; allowed: an object")
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if not isinstance(rope_type, str) or rope_type not in _ROPE_TYPES:
            raise ConfigError(f"rope_type is {rope_type!r}; allowed: {', '.join(sorted(_ROPE_TYPES))}")
        settings = dict(parameters)
        if "original_max_position_embeddings" in config:
            settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        for key, default in (("rope_theta", 10_000.0), ("partial_rotary_factor", 1.0)):
            settings[key] = settings.get(key) or config.get(key) or default
        theta = _read_number(settings, "rope_theta", rope_type)
        rotary_dim = int(head_dim * _read_number(settings, "partial_rotary_factor", rope_type))
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ConfigError(f"{rotary_dim} dimensions of a head are rotated; allowed: even, at most {head_dim}")
        return cls(rope_type, float(theta), rotary_dim, max_position_embeddings, settings)

    def number(self, key: str, default: float | None = None) -> float:
        """The scaling's setting `key`. Raises ConfigError if it is missing or not a positive number."""
        return _read_number(self.parameters, key, self.rope_type, default)

    @property
    def original_max_position_embeddings(self) -> float:
        """The context length before scaling."""
        return self.number("original_max_position_embeddings", self.max_position_embeddings)

    @property
    def max_position(self) -> int:
        """Positions that the table covers: the scaled context length."""
        return max(self.max_position_embeddings, int(_ROPE_TYPES[self.rope_type].context_length(self)))


def _read_number(settings: Mapping[str, Any], key: str, rope_type: str, default: float | None = None) -> float:
    value = settings.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{key} of rope_type {rope_type!r} is {value!r}; allowed: a positive number")
    return value


def _base_frequencies(theta: float, dim: int) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    return 1.0 / (theta**exponents)


def _default(rope: RopeConfig) -> tuple[Tensor, float]:
    return _base_frequencies(rope.theta, rope.rotary_dim), 1.0


def _linear(rope: RopeConfig) -> tuple[Tensor, float]:
    return _base_frequencies(rope.theta, rope.rotary_dim) / rope.number("factor"), 1.0


def _dynamic(rope: RopeConfig) -> tuple[Tensor, float]:
    # transformers recomputes the base as a sequence grows, which would make a token depend on how long its
    # request has become; here the base is that of the longest sequence, always.
    factor, dim = rope.number("factor"), rope.rotary_dim
    stretch = (factor * rope.max_position / rope.max_position_embeddings) - (factor - 1)
    return _base_frequencies(rope.theta * stretch ** (dim / (dim - 2)), dim), 1.0


def _yarn(rope: RopeConfig) -> tuple[Tensor, float]:
    dim, factor = rope.rotary_dim, _yarn_factor(rope)
    original = rope.original_max_position_embeddings

    def correction_dim(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low = correction_dim(rope.number("beta_fast", 32))
    high = correction_dim(rope.number("beta_slow", 1))
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp must have a slope
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    wavelengths = rope.theta ** (torch.arange(0, dim, 2).to(torch.float32) / dim)
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return frequencies, _yarn_attention_factor(rope, factor)


def _yarn_factor(rope: RopeConfig) -> float:
    return rope.number("factor", rope.max_position_embeddings / rope.original_max_position_embeddings)


def _yarn_attention_factor(rope: RopeConfig, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.parameters.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if rope.parameters.get("mscale") and rope.parameters.get("mscale_all_dim"):
        return mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    return mscale(1.0)


def _llama3(rope: RopeConfig) -> tuple[Tensor, float]:
    frequencies = _base_frequencies(rope.theta, rope.rotary_dim)
    factor, original = rope.number("factor"), rope.original_max_position_embeddings
    low_factor, high_factor = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > original / low_factor, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low_factor) / (high_factor - low_factor)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelengths < original / high_factor) * ~(wavelengths > original / low_factor)
    return torch.where(medium, between, scaled), 1.0


def _unscaled_length(rope: RopeConfig) -> float:
    return rope.max_position_embeddings


@dataclass(frozen=True, slots=True)
class _RopeType:
    frequencies: Callable[[RopeConfig], tuple[Tensor, float]]  # [rotary_dim / 2] float32, factor of cos and sin
    context_length: Callable[[RopeConfig], float] = _unscaled_length


_ROPE_TYPES: dict[str, _RopeType] = {
    "default": _RopeType(_default),
    "linear": _RopeType(_linear, lambda rope: rope.max_position_embeddings * rope.number("factor")),
    "dynamic": _RopeType(_dynamic, lambda rope: rope.max_position_embeddings * rope.number("factor")),
    "yarn": _RopeType(_yarn, lambda rope: rope.original_max_position_embeddings * _yarn_factor(rope)),
    "llama3": _RopeType(_llama3),
}


class RotaryEmbedding(Layer):
    """The table, one for all layers of a model; float32 whatever the compute dtype."""

    def __init__(self, rope: RopeConfig, device: torch.device) -> None:
        self._rope = rope
        self._factors: Tensor | None = None
        # [max_position, rotary_dim]: cosines, then sines; filled by finish_loading
        self.cos_sin = torch.empty(rope.max_position, rope.rotary_dim, dtype=torch.float32, device=device)

    def weight_slots(self) -> dict[str, WeightSlot]:
        # GGUF files of Llama 3.1 and later carry the scaling as divisors of the unscaled frequencies.
        return {"rope_freqs.weight": WeightSlot((self._rope.rotary_dim // 2,), self._load_factors, required=False)}

    def _load_factors(self, tensor: Tensor) -> None:
        self._factors = tensor.to(torch.float32)

    def finish_loading(self) -> None:
        if self._factors is not None:
            frequencies, scale = _default(self._rope)[0] / self._factors, 1.0
        else:
            frequencies, scale = _ROPE_TYPES[self._rope.rope_type].frequencies(self._rope)
        angles = torch.arange(self._rope.max_position, dtype=torch.float32)[:, None] * frequencies
        half = self._rope.rotary_dim // 2
        self.cos_sin[:, :half].copy_(angles.cos() * scale)
        self.cos_sin[:, half:].copy_(angles.sin() * scale)
