"""Owns the Triton RMSNorm: one program a row, the row in registers.
Does not know the model."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from servd_kernels.strides import outer_inner
from servd_kernels.triton_support import POINTERS, CompileCase, narrow, unsupported

MAX_HIDDEN = 16384  # a row must fit the registers of one program


def supports(device: str, dtype: torch.dtype, hidden: int = 1, **axes: object) -> str | None:
    if hidden > MAX_HIDDEN:
        return f"hidden must be at most {MAX_HIDDEN}, not {hidden}"
    return unsupported(device, dtype)


@triton.jit
def _kernel(
    x, residual, weight, out, total,
    inner, x_outer, x_inner, residual_outer, residual_inner, hidden, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    outer_index, inner_index = row // inner, row % inner
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    values = tl.load(x + outer_index * x_outer + inner_index * x_inner + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        other = tl.load(
            residual + outer_index * residual_outer + inner_index * residual_inner + column, mask=mask, other=0.0
        )
        # The statistics are those of the rounded sum: it is what the next layer will read.
        rounded = narrow(values + other.to(tl.float32), total.dtype.element_ty)
        tl.store(total + row * hidden + column, rounded, mask=mask)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / hidden + eps)
    gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + column, narrow(values * scale * gain, out.dtype.element_ty), mask=mask)


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 512))


def run(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    hidden = x.shape[-1]
    rows, outer, inner, outer_stride, inner_stride = outer_inner(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    other, _, _, other_outer, other_inner = outer_inner(x if residual is None else residual)
    block = triton.next_power_of_2(hidden)
    if outer * inner:
        _kernel[(outer * inner,)](
            rows, other, weight, out, total, inner, outer_stride, inner_stride, other_outer, other_inner, hidden, eps,
            HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=_num_warps(block),
        )  # fmt: skip
    return out if residual is None else (out, total)


def compile_cases() -> Iterator[CompileCase]:
    """Hidden sizes of the starter model, of Llama-3-8B, and of a head for QK-norm."""
    for hidden in (64, 576, 4096):
        for has_residual in (False, True):
            pointer = POINTERS[torch.bfloat16]
            block = triton.next_power_of_2(hidden)
            yield CompileCase(
                name=f"hidden {hidden}{' + residual' if has_residual else ''}",
                kernel=_kernel,
                signature=dict.fromkeys(("x", "residual", "weight", "out", "total"), pointer)
                | dict.fromkeys(
                    ("inner", "x_outer", "x_inner", "residual_outer", "residual_inner", "hidden"), "i32"
                )
                | {"eps": "fp32"},
                constants={"HAS_RESIDUAL": has_residual, "BLOCK": block},
                num_warps=_num_warps(block),
            )
