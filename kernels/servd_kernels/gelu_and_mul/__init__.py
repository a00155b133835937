"""Owns the gate of GEGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202).
Does not know the projections around it."""

import torch

from servd_kernels.activation import check_gated, check_options
from servd_kernels.registry import Op

OP = Op("gelu_and_mul")


def gelu_and_mul(
    x: torch.Tensor,
    approximate: str = "none",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """gelu(first half) * second half of the last dimension, in float32 inside; approximate: see `gelu`.

    x [..., 2 * width] float32, bfloat16 or float16 -> [..., width] of x's dtype. out_dtype int8 or float8_e4m3fn:
    (codes [..., width], scales float32 [...]), as activation.quantize_rows makes them of the float32 values. Raises
    ValueError for an odd last dimension, another approximation or another out_dtype.
    """
    check_gated(x)
    check_options(approximate, out_dtype)
    run = OP.bind(x.device.type, x.dtype, backend, width=x.shape[-1] // 2, out_dtype=out_dtype)
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = run(x, approximate, out_dtype)
    return out
