"""Owns the Triton W8A8 linear: its kernels, its launch and the cases to compile.
Does not know tiles (triton_gemm.py), nor how rows are rounded (triton_gemm_rows.py).

Integer sums are exact, so that any tile gives the same bits; sums of groups are added in float32 in ascending order."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional

from servd_kernels import triton_gemm, triton_gemm_rows
from servd_kernels.coded_linear import BoundLinear
from servd_kernels.linear.packed import ACTIVATIONS
from servd_kernels.linear_w8a8.packed import PackedWeight
from servd_kernels.triton_gemm import (
    dot,
    load_columns,
    product,
    program_tile,
    row_pointers,
    scale_tile,
)
from servd_kernels.triton_gemm_end import finish_tile, interleave
from servd_kernels.triton_support import ARCHITECTURES, CompileCase, unsupported

_DTYPE = torch.int8


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(
    codes: torch.Tensor, scales: torch.Tensor, activation_group: int | None = None, gated: bool = False,
    rotation: int | None = None,
) -> PackedWeight:  # fmt: skip
    """Rows as they are, each at a multiple of 16 bytes; with a gate its rows and those of the up matrix in turn."""
    if gated:
        codes, scales = interleave(codes), interleave(scales)
    rows, columns = codes.shape
    data = functional.pad(codes, (0, -columns % 16)).contiguous()
    return PackedWeight(
        data, scales.contiguous(), rows // 2 if gated else rows, columns, activation_group, rotation, gated, run
    )


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(
    x, weight, x_scales, scales, bias, residual, out, num_rows, num_columns, depth, x_stride, weight_stride,
    residual_stride, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    row, column = program_tile(num_rows, num_columns, ROWS, COLUMNS)
    acc, _ = product(
        x, weight, row, column, num_rows, num_columns, depth, x_stride, weight_stride,
        ROWS, COLUMNS, BLOCK, False, HAS_DESCRIPTORS, IS_EVEN, "ieee",
    )  # fmt: skip
    values = acc.T.to(tl.float32)
    values = scale_tile(values, x_scales, scales, row, column, num_rows, num_columns, ROWS, COLUMNS)
    finish_tile(
        values, bias, residual, residual_stride, out, row, column, num_rows, num_columns,
        ACTIVATION, IS_GATED, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _groups_kernel(
    x, weight, x_scales, scales, bias, residual, out, num_rows, num_columns, depth, x_stride, weight_stride,
    residual_stride, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK is the group of activations; x_scales [num_rows, num_groups]."""
    row, column = program_tile(num_rows, num_columns, ROWS, COLUMNS)
    x_rows = row_pointers(x, row, num_rows, x_stride, ROWS, BLOCK)
    weight_rows = row_pointers(weight, column, num_columns, weight_stride, COLUMNS, BLOCK)
    token = tl.minimum(row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
    group_scales = x_scales + token * tl.cdiv(depth, BLOCK)
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(0, depth, BLOCK):
        x_scale = tl.load(group_scales + start // BLOCK)
        tokens = load_columns(x_rows, start, depth, BLOCK, IS_EVEN).T
        codes = load_columns(weight_rows, start, depth, BLOCK, IS_EVEN)
        part = dot(codes, tokens, tl.zeros([COLUMNS, ROWS], tl.int32), "ieee")
        total += part.to(tl.float32) * x_scale[None, :]
    values = scale_tile(total.T, None, scales, row, column, num_rows, num_columns, ROWS, COLUMNS)
    finish_tile(
        values, bias, residual, residual_stride, out, row, column, num_rows, num_columns,
        ACTIVATION, IS_GATED, ROWS, COLUMNS,
    )  # fmt: skip


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scales: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or (torch.float32 if x.dtype == _DTYPE else x.dtype)
    out = torch.empty(len(x), packed.out_features, dtype=out_dtype, device=x.device)
    if out.numel():
        launch(triton_gemm.architecture_of(x.device), x, packed, bias, x_scales, activation, residual, out)
    return out


def launch(
    arch: str,
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes to out [num_rows, out_features], with the tiles of an architecture."""
    x = triton_gemm.with_unit_columns(x)
    group = packed.activation_group
    if x_scales is None:
        x, x_scales = triton_gemm_rows.quantize(x, triton_gemm_rows.INT8, group, packed.rotation)
    tiles = _tiles(arch, group, packed.gated, len(x))
    block = group or triton_gemm.block_for(arch, _DTYPE)
    weight = packed.data[:, : packed.in_features]
    operands: tuple[Any, Any] = (x, weight)
    choices: dict[str, Any] = {"IS_EVEN": packed.in_features % block == 0, "IS_GATED": packed.gated}
    if not group:
        choices["HAS_DESCRIPTORS"], operands = triton_gemm.operands(arch, tiles, block, x, weight)
    (_groups_kernel if group else _kernel)[triton_gemm.grid(tiles, len(x), len(weight))](
        *operands, x_scales.contiguous(), packed.scales, bias, residual, out, len(x), len(weight), packed.in_features,
        x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
        ACTIVATION=ACTIVATIONS[activation], ROWS=tiles.rows, COLUMNS=tiles.columns,
        BLOCK=block, **choices, **triton_gemm.options(arch, tiles),
    )  # fmt: skip


def _tiles(arch: str, group: int | None, gated: bool, num_rows: int) -> triton_gemm.Tiles:
    table = triton_gemm.GROUPED if group else triton_gemm.GATED if gated else triton_gemm.INTEGER
    return triton_gemm.tiles_for(table[arch], num_rows)


def compile_cases() -> Iterator[CompileCase]:
    """Sizes are arguments: a case stands for all the shapes of Llama-3-8B and of the starter, which fill blocks."""
    for group in (None, 64, 128):
        suffix = f" in groups of {group}" if group else ""
        yield triton_gemm_rows.case(f"rows to int8{suffix}", triton_gemm_rows.INT8, group)
        yield triton_gemm_rows.case(f"rows rotated by 64 to int8{suffix}", triton_gemm_rows.INT8, group, 64)
        for arch in ARCHITECTURES:
            for rows in triton_gemm.INTEGER[arch]:
                for gated in (False, True):
                    name = f"{triton_gemm.class_name(rows)}{suffix}{' gated' if gated else ''}"
                    yield _case(name, arch, rows, group, gated)


def _case(name: str, arch: str, rows: int, group: int | None, gated: bool) -> CompileCase:
    tiles = _tiles(arch, group, gated, rows)
    block = group or triton_gemm.block_for(arch, _DTYPE)
    integers = ("num_rows", "num_columns", "depth", "x_stride", "weight_stride", "residual_stride")
    constants = (
        dict(triton_gemm.PLAIN_END)
        | {"ACTIVATION": int(gated), "IS_GATED": gated}
        | {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "BLOCK": block}
    )
    operands = {"x": "*i8", "weight": "*i8"}
    if not group:
        operands = triton_gemm.operand_types(arch, tiles, block, "*i8")
        constants["HAS_DESCRIPTORS"] = arch in triton_gemm.HAVE_TMA
    return triton_gemm.case(
        name, arch, tiles, _groups_kernel if group else _kernel,
        operands | {"x_scales": "*fp32", "scales": "*fp32", "residual": "*bf16", "out": "*bf16"}, integers, constants,
    )  # fmt: skip
