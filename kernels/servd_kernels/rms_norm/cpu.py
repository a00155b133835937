"""Owns the call of the native RMSNorm.
Does not know vectors or threads (cpu.cpp)."""

import torch

from servd_kernels import native

_KERNEL = native.Function("rms_norm", "pllpllppplllfi")


def supports(device: str, dtype: torch.dtype, **axes: int) -> str | None:
    return native.unsupported(device, dtype)


def _outer_inner(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """x, or a copy that the kernel can walk, and its rows as [outer, inner] with strides."""
    if x.dim() > 3 or x.stride(-1) != 1:
        x = x.contiguous().view(-1, x.shape[-1])
    if x.dim() == 2:
        return x, x.shape[0], 1, x.stride(0), 0
    if x.dim() == 3:
        return x, x.shape[0], x.shape[1], x.stride(0), x.stride(1)
    return x, 1, 1, 0, 0


def run(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype)
    code, hidden = native.DTYPES[x.dtype], x.shape[-1]
    rows, outer, inner, outer_stride, inner_stride = _outer_inner(x)
    x_at, weight_at, out_at = rows.data_ptr(), weight.data_ptr(), out.data_ptr()
    if residual is None:
        _KERNEL.call(
            x_at, outer_stride, inner_stride, None, 0, 0, weight_at, out_at, None,
            outer, inner, hidden, eps, code,
        )  # fmt: skip
        return out
    total = torch.empty(x.shape, dtype=x.dtype)
    other, _, _, other_outer, other_inner = _outer_inner(residual)
    _KERNEL.call(
        x_at, outer_stride, inner_stride, other.data_ptr(), other_outer, other_inner, weight_at, out_at,
        total.data_ptr(), outer, inner, hidden, eps, code,
    )  # fmt: skip
    return out, total
