"""RMS norm and layer norm, alone or together with the residual addition before it.

Knows nothing of where it stands; a rank holds it whole.
"""

from __future__ import annotations

import torch
from servd_kernels import layer_norm, rms_norm
from torch import Tensor

from servd.layers.base import Layer, LayerContext, WeightSlot


class RMSNorm(Layer):
    """x / sqrt(mean(x²) + eps) * weight over the last axis."""

    def __init__(self, context: LayerContext, name: str, size: int, eps: float) -> None:
        self._name = name
        self._eps = eps
        self._weight = torch.empty(size, dtype=context.dtype, device=context.device)
        self._rms_norm = rms_norm.OP.bind(device=context.device.type, dtype=context.dtype, hidden=size)

    def weight_slots(self) -> dict[str, WeightSlot]:
        return {f"{self._name}.weight": _slot(self._weight)}

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., size] → the same shape."""
        output: Tensor = self._rms_norm(x, self._weight, self._eps)
        return output

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual [num_tokens, size] → (norm of their sum, their sum)."""
        output, residual = self._rms_norm(x, self._weight, self._eps, residual)
        return output, residual


class LayerNorm(Layer):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last axis; some models have no bias."""

    def __init__(self, context: LayerContext, name: str, size: int, eps: float, bias: bool = True) -> None:
        self._name = name
        self._eps = eps
        self._weight = torch.empty(size, dtype=context.dtype, device=context.device)
        self._bias = torch.empty_like(self._weight) if bias else None
        self._layer_norm = layer_norm.OP.bind(device=context.device.type, dtype=context.dtype, hidden=size)

    def weight_slots(self) -> dict[str, WeightSlot]:
        slots = {f"{self._name}.weight": _slot(self._weight)}
        if self._bias is not None:
            slots[f"{self._name}.bias"] = _slot(self._bias)
        return slots

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., size] → the same shape."""
        output: Tensor = self._layer_norm(x, self._weight, self._bias, self._eps)
        return output

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual [num_tokens, size] → (norm of their sum, their sum)."""
        output, residual = self._layer_norm(x, self._weight, self._bias, self._eps, residual)
        return output, residual


def _slot(parameter: Tensor) -> WeightSlot:
    def load(tensor: Tensor) -> None:
        parameter.copy_(tensor)

    return WeightSlot(tuple(parameter.shape), load)
