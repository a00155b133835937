"""Owns the call of the native GEGLU gate.
Does not know vectors or threads (cpu.cpp)."""

import torch

from servd_kernels import native
from servd_kernels.activation.native import Activation

_ACTIVATION = Activation("gelu_and_mul", is_gated=True)


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def run(
    x: torch.Tensor, approximate: str = "none", out_dtype: torch.dtype | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return _ACTIVATION(x, approximate, out_dtype)
