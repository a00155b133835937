"""Owns the call of the native LayerNorm.
Does not know vectors or threads (cpu.cpp)."""

import torch

from servd_kernels import native
from servd_kernels.strides import empty_like, outer_inner

_KERNEL = native.Function("layer_norm", "pllpllpppplllfi")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    out = empty_like(x)
    code, hidden = native.DTYPES[x.dtype], x.shape[-1]
    rows, outer, inner, outer_stride, inner_stride = outer_inner(x)
    x_at, weight_at, out_at = rows.data_ptr(), weight.data_ptr(), out.data_ptr()
    bias_at = None if bias is None else bias.data_ptr()
    if residual is None:
        _KERNEL.call(
            x_at, outer_stride, inner_stride, None, 0, 0, weight_at, bias_at, out_at, None,
            outer, inner, hidden, eps, code,
        )  # fmt: skip
        return out
    total = empty_like(x)
    other, _, _, other_outer, other_inner = outer_inner(residual)
    _KERNEL.call(
        x_at, outer_stride, inner_stride, other.data_ptr(), other_outer, other_inner, weight_at, bias_at, out_at,
        total.data_ptr(), outer, inner, hidden, eps, code,
    )  # fmt: skip
    return out, total
