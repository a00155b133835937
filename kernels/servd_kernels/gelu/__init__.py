"""Owns GELU without a gate (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415).
Does not know the projections around it."""

import torch

from servd_kernels.activation import check_options
from servd_kernels.registry import Op

OP = Op("gelu")


def gelu(
    x: torch.Tensor,
    approximate: str = "none",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x * Phi(x), in float32 inside; approximate "tanh": 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    x [..., width] float32, bfloat16 or float16 -> the same shape and dtype. out_dtype int8 or float8_e4m3fn: (codes
    [..., width], scales float32 [...]), as activation.quantize_rows makes them of the float32 values. Raises
    ValueError for a scalar, another approximation or another out_dtype.
    """
    if x.dim() == 0:
        raise ValueError("x must have a last dimension, not be a scalar")
    check_options(approximate, out_dtype)
    run = OP.bind(x.device.type, x.dtype, backend, width=x.shape[-1], out_dtype=out_dtype)
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = run(x, approximate, out_dtype)
    return out
