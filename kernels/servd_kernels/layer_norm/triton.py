"""Owns the Triton LayerNorm: a few rows a program, in registers.
Does not know the model."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from servd_kernels.norm.triton import cases, load_rows, supports, tile
from servd_kernels.strides import empty_like, outer_inner
from servd_kernels.triton_support import CompileCase, narrow

__all__ = ["compile_cases", "run", "supports"]


@triton.jit
def _kernel(
    x, residual, weight, bias, out, total,
    num_rows, inner, x_outer, x_inner, residual_outer, residual_inner, hidden, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (column < hidden)
    values = load_rows(
        x, residual, total, row, column, mask, inner, x_outer, x_inner, residual_outer, residual_inner, hidden,
        HAS_RESIDUAL,
    )  # fmt: skip
    mean = (tl.sum(values, 1) / hidden)[:, None]
    # Of the deviations: the mean of squares less the square of the mean cancels.
    deviation = tl.where(column < hidden, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(deviation * deviation, 1) / hidden + eps)[:, None]
    result = deviation * scale * tl.load(weight + column, mask=column < hidden, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + column, narrow(result, out.dtype.element_ty), mask=mask)


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    hidden = x.shape[-1]
    rows, outer, inner, outer_stride, inner_stride = outer_inner(x)
    out = empty_like(x)
    total = out if residual is None else empty_like(out)
    other, _, _, other_outer, other_inner = outer_inner(x if residual is None else residual)
    num_rows, (tile_rows, block, num_warps) = outer * inner, tile(hidden)
    if num_rows:
        _kernel[(triton.cdiv(num_rows, tile_rows),)](
            rows, other, weight, weight if bias is None else bias, out, total,
            num_rows, inner, outer_stride, inner_stride, other_outer, other_inner, hidden, eps,
            HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, ROWS=tile_rows, BLOCK=block,
            num_warps=num_warps,
        )  # fmt: skip
    return out if residual is None else (out, total)


def compile_cases() -> Iterator[CompileCase]:
    return cases(_kernel, ("weight", "bias"), HAS_BIAS=True)
