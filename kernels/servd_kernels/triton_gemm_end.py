"""Owns the end of the Triton linears over coded weights: bias, activation, gate, residual, and the rows of a gate.
Does not know codes or scales, nor tiles (triton_gemm.py)."""

import torch
import triton
import triton.language as tl

from servd_kernels.triton_gemm import activate, add_row, store_tile


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """A gate's rows above as many of the up matrix, one by one in turn: a tile of columns then holds both."""
    return torch.stack(rows.chunk(2), 1).flatten(0, 1)


@triton.jit
def finish_tile(
    values, bias, residual, residual_stride, out, row, column, num_rows, num_columns,
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """values float32 [ROWS, COLUMNS], of weights whose rows `interleave` ordered if IS_GATED: num_columns of them."""
    if IS_GATED:
        WIDTH: tl.constexpr = COLUMNS // 2
        gate, up = tl.split(tl.reshape(values, [ROWS, WIDTH, 2]))
        up_bias = bias
        if bias is not None:
            up_bias = bias + num_columns // 2
        gate = activate(add_row(gate, bias, column // 2, num_columns // 2, WIDTH), ACTIVATION)
        gate *= add_row(up, up_bias, column // 2, num_columns // 2, WIDTH)
        store_tile(gate, out, residual, residual_stride, row, column // 2, num_rows, num_columns // 2, ROWS, WIDTH)
    else:
        values = activate(add_row(values, bias, column, num_columns, COLUMNS), ACTIVATION)
        store_tile(values, out, residual, residual_stride, row, column, num_rows, num_columns, ROWS, COLUMNS)
