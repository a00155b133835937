"""Owns the Triton linear: its kernel, its launch and the cases to compile.
Does not know tiles, nor how they are multiplied (triton_gemm.py)."""

import dataclasses
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from servd_kernels import triton_gemm
from servd_kernels.linear import reference
from servd_kernels.linear.packed import ACTIVATIONS, BoundLinear, PackedWeight
from servd_kernels.triton_gemm import activate, add_row, product, program_tile, store_tile
from servd_kernels.triton_support import ARCHITECTURES, POINTERS, CompileCase, unsupported


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(weight: torch.Tensor, gated: bool = False) -> PackedWeight:
    """The weight's rows as they are, one after the other."""
    return dataclasses.replace(reference.pack(weight.contiguous(), gated), run=run)


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(
    x, weight, bias, residual, out, num_rows, num_columns, depth, x_stride, residual_stride,
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr, IS_EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = program_tile(num_rows, num_columns, ROWS, COLUMNS)
    acc, other = product(
        x, weight, row, column, num_rows, num_columns, depth, x_stride, depth,
        ROWS, COLUMNS, BLOCK, IS_GATED, HAS_DESCRIPTORS, IS_EVEN, PRECISION,
    )  # fmt: skip
    values = activate(add_row(acc.T, bias, column, num_columns, COLUMNS), ACTIVATION)
    if IS_GATED:
        up_bias = bias
        if bias is not None:
            up_bias = bias + num_columns
        values *= add_row(other.T, up_bias, column, num_columns, COLUMNS)
    store_tile(values, out, residual, residual_stride, row, column, num_rows, num_columns, ROWS, COLUMNS)


def _table(arch: str, dtype: torch.dtype, gated: bool) -> triton_gemm.Table:
    if dtype == torch.float32:
        return triton_gemm.FLOAT32[arch]
    return (triton_gemm.GATED if gated else triton_gemm.PLAIN)[arch]


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty(len(x), packed.out_features, dtype=out_dtype or x.dtype, device=x.device)
    if out.numel():
        launch(triton_gemm.architecture_of(x.device), x, packed, bias, activation, residual, out)
    return out


def launch(
    arch: str,
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes to out [num_rows, out_features], with the tiles of an architecture: bits do not depend on it under the
    interpreter, and on a GPU it is the GPU's own."""
    x = triton_gemm.with_unit_columns(x)
    tiles = triton_gemm.tiles_for(_table(arch, x.dtype, packed.gated), len(x))
    block = triton_gemm.block_for(arch, x.dtype)
    has_descriptors, operands = triton_gemm.operands(arch, tiles, block, x, packed.data)
    _kernel[triton_gemm.grid(tiles, len(x), packed.out_features)](
        *operands, bias, residual, out, len(x), packed.out_features, packed.in_features, x.stride(0),
        0 if residual is None else residual.stride(0),
        ACTIVATION=ACTIVATIONS[activation], IS_GATED=packed.gated, ROWS=tiles.rows, COLUMNS=tiles.columns,
        BLOCK=block, HAS_DESCRIPTORS=has_descriptors, IS_EVEN=packed.in_features % block == 0,
        PRECISION=triton_gemm.precision(arch), **triton_gemm.options(arch, tiles),
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Sizes are arguments, so that what a launch compiles differs by class of rows, by gate and by dtype alone: one
    case stands for all the shapes of Llama-3-8B and of the starter, whose depths are multiples of the block."""
    for arch in ARCHITECTURES:
        for gated in (False, True):
            for rows in triton_gemm.PLAIN[arch]:
                yield _case(arch, rows, torch.bfloat16, gated)
        for rows in triton_gemm.FLOAT32[arch]:
            yield _case(arch, rows, torch.float32, False)


def _case(arch: str, rows: int, dtype: torch.dtype, gated: bool) -> CompileCase:
    tiles = triton_gemm.tiles_for(_table(arch, dtype, gated), rows)
    block = triton_gemm.block_for(arch, dtype)
    pointer = POINTERS[dtype]
    return triton_gemm.case(
        f"{'gate_up ' if gated else ''}{str(dtype).removeprefix('torch.')} {triton_gemm.class_name(rows)}",
        arch,
        tiles,
        _kernel,
        triton_gemm.operand_types(arch, tiles, block, pointer) | {"residual": pointer, "out": pointer},
        ("num_rows", "num_columns", "depth", "x_stride", "residual_stride"),
        {
            "bias": None, "ACTIVATION": ACTIVATIONS["silu"] if gated else 0, "IS_GATED": gated, "ROWS": tiles.rows,
            "COLUMNS": tiles.columns, "BLOCK": block, "HAS_DESCRIPTORS": arch in triton_gemm.HAVE_TMA,
            "IS_EVEN": True, "PRECISION": triton_gemm.precision(arch),
        },
    )  # fmt: skip
