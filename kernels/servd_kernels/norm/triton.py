"""Owns what the Triton norms share: rows with their residual in registers, tiles, and cases to compile.
Does not know the statistics."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from servd_kernels.triton_support import POINTERS, CompileCase, narrow, unsupported

MAX_HIDDEN = 16384  # a row must fit the registers of one program
_INTEGERS = ("num_rows", "inner", "x_outer", "x_inner", "residual_outer", "residual_inner", "hidden")


def supports(device: str, dtype: torch.dtype, hidden: int = 1, **axes: object) -> str | None:
    if hidden > MAX_HIDDEN:
        return f"hidden must be at most {MAX_HIDDEN}, not {hidden}"
    return unsupported(device, dtype)


@triton.jit
def load_rows(
    x, residual, total, row, column, mask, inner, x_outer, x_inner, residual_outer, residual_inner, hidden,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """float32 values of rows [outer, inner]; with a residual, their rounded sum, which is stored in total too."""
    outer_index, inner_index = row // inner, row % inner
    at = outer_index * x_outer + inner_index * x_inner + column
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        at = outer_index * residual_outer + inner_index * residual_inner + column
        values += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        # The statistics are those of the rounded sum: it is what the next layer will read.
        rounded = narrow(values, total.dtype.element_ty)
        tl.store(total + row * hidden + column, rounded, mask=mask)
        values = rounded.to(tl.float32)
    return values


def tile(hidden: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program: at least 1,024 elements, so that a head of 64 does not waste a warp."""
    block = triton.next_power_of_2(hidden)
    rows = max(1, 1024 // block)
    return rows, block, min(16, max(2, rows * block // 512))


def cases(kernel: Any, vectors: tuple[str, ...], **constants: object) -> Iterator[CompileCase]:
    """Hidden sizes of the starter model and of Llama-3-8B, and heads for QK-norm; `vectors` are [hidden]."""
    pointers = ("x", "residual", *vectors, "out", "total")
    for hidden, has_residual in ((64, False), (128, False), (576, False), (576, True), (4096, False), (4096, True)):
        rows, block, num_warps = tile(hidden)
        yield CompileCase(
            name=f"hidden {hidden}{' + residual' if has_residual else ''}",
            kernel=kernel,
            signature=dict.fromkeys(pointers, POINTERS[torch.bfloat16])
            | dict.fromkeys(_INTEGERS, "i32")
            | {"eps": "fp32"},
            constants={"HAS_RESIDUAL": has_residual, "ROWS": rows, "BLOCK": block, **constants},
            aligned=(*pointers, *(name for name in _INTEGERS if name not in ("num_rows", "inner"))),
            num_warps=num_warps,
        )
