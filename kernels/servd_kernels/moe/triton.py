"""Owns the Triton experts: a grouped product for gate and up, one for down, and the sum over a token's slots.
Does not know how rows are sorted by expert (triton_groups.py), nor how tiles are multiplied (triton_gemm.py)."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from servd_kernels import triton_gemm, triton_groups
from servd_kernels.linear.packed import ACTIVATIONS
from servd_kernels.moe.packed import BoundMoe, PackedExperts
from servd_kernels.triton_gemm import MANY, Table, Tiles, activate, dot, load_columns
from servd_kernels.triton_groups import Groups, program_tile, tile_rows
from servd_kernels.triton_support import ARCHITECTURES, POINTERS, CompileCase, narrow, unsupported

_SPAN = 1024  # columns of one program that adds a token's slots

# By the mean number of rows of an expert. Both products take the same height: rows are sorted once.
_TABLES: dict[str, Table] = {
    "sm_80": {16: Tiles(32, 16, 4, 5), 64: Tiles(64, 64, 4, 4), MANY: Tiles(64, 128, 8, 3)},
    "sm_90": {16: Tiles(64, 16, 4, 5), 64: Tiles(64, 64, 4, 4), MANY: Tiles(128, 128, 8, 3)},
    "sm_100": {16: Tiles(64, 16, 4, 5), 64: Tiles(64, 64, 4, 4), MANY: Tiles(128, 128, 8, 3)},
    "gfx942": {16: Tiles(64, 16, 4, 2), 64: Tiles(64, 64, 4, 2), MANY: Tiles(64, 128, 8, 2)},
    triton_gemm.INTERPRETER: {16: Tiles(64, 16, 4, 1), MANY: Tiles(64, 64, 4, 1)},
}
_FLOAT32: dict[str, Table] = {
    arch: {16: Tiles(64, 16, 4, 2), MANY: Tiles(64, 32, 4, 2)} for arch in (*ARCHITECTURES, triton_gemm.INTERPRETER)
}


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundMoe:
    return BoundMoe(pack, run)


def pack(gate_up: torch.Tensor, down: torch.Tensor) -> PackedExperts:
    """The weights as they are, contiguous."""
    experts, hidden, intermediate = down.shape
    return PackedExperts(gate_up.contiguous(), down.contiguous(), experts, hidden, intermediate, run)


@triton.jit(do_not_specialize=["num_tiles"])
def _kernel(
    x, weight, order, tiles, out, num_tiles, num_columns, depth, x_stride, top_k,
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    IS_EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With a gate: x by token -> out by place in the order. Without: x by place -> out by row."""
    tile, column_tile = program_tile(num_tiles, tl.cdiv(num_columns, COLUMNS))
    expert, place, row, mask = tile_rows(order, tiles, tile, ROWS)
    if expert < 0:
        return
    source, target = place, row
    if IS_GATED:
        source, target = row // top_k, place
    step = tl.arange(0, BLOCK)
    x_rows = x + source.to(tl.int64)[:, None] * x_stride + step[None, :]
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    height = tl.cast(num_columns, tl.int64) * (2 if IS_GATED else 1)
    inside = tl.minimum(column, num_columns - 1).to(tl.int64)
    weight_rows = weight + (expert * height + inside)[:, None] * depth + step[None, :]
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    other = acc
    if IS_GATED:
        other_rows = weight_rows + tl.cast(num_columns, tl.int64) * depth
    for start in range(0, depth, BLOCK):
        tokens = load_columns(x_rows, start, depth, BLOCK, IS_EVEN).T
        acc = dot(load_columns(weight_rows, start, depth, BLOCK, IS_EVEN), tokens, acc, PRECISION)
        if IS_GATED:
            other = dot(load_columns(other_rows, start, depth, BLOCK, IS_EVEN), tokens, other, PRECISION)
    values = acc
    if IS_GATED:
        values = activate(acc, ACTIVATION) * other
    places = out + target.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(places, narrow(values.T, out.dtype.element_ty), mask=mask[:, None] & (column < num_columns)[None, :])


@triton.jit
def _combine(parts, weights, ids, out, num_experts, top_k, hidden, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(top_k):
        row = token * top_k + slot
        expert = tl.load(ids + row)
        # Not read where no expert wrote.
        has_expert = (expert >= 0) & (expert < num_experts)
        part = tl.load(parts + row * hidden + column, mask=column < tl.where(has_expert, hidden, 0), other=0.0)
        total += tl.where(has_expert, tl.load(weights + row), 0.0) * part
    tl.store(out + token * hidden + column, narrow(total, out.dtype.element_ty), mask=column < hidden)


def run(
    x: torch.Tensor,
    packed: PackedExperts,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str | None = "silu",
) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    arch = triton_gemm.architecture_of(x.device)
    x = triton_gemm.with_unit_columns(x)
    tokens, top_k = ids.shape
    table = (_FLOAT32 if x.dtype == torch.float32 else _TABLES)[arch]
    tiles = triton_gemm.tiles_for(table, triton.cdiv(tokens * top_k, packed.num_experts))
    groups = triton_groups.sort_rows(ids, packed.num_experts, tiles.rows)
    inner = x.new_empty(tokens * top_k, packed.intermediate)
    parts = x.new_empty(tokens * top_k, packed.hidden, dtype=torch.float32)
    _multiply(arch, tiles, groups, x, packed.gate_up, inner, top_k, activation, True)
    _multiply(arch, tiles, groups, inner, packed.down, parts, top_k, None, False)
    _combine[(tokens, triton.cdiv(packed.hidden, _SPAN))](
        parts, weights, ids, out, packed.num_experts, top_k, packed.hidden, BLOCK=_SPAN, **_UNFUSED
    )
    return out


_UNFUSED = {"enable_fp_fusion": False}


def _multiply(
    arch: str, tiles: Tiles, groups: Groups, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, top_k: int,
    activation: str | None, is_gated: bool,
) -> None:  # fmt: skip
    columns, depth = out.shape[1], weight.shape[2]
    if not columns:
        return
    block = triton_gemm.block_for(arch, x.dtype)
    _kernel[(groups.num_tiles * triton.cdiv(columns, tiles.columns),)](
        x, weight, groups.order, groups.tiles, out, groups.num_tiles, columns, depth, x.stride(0), top_k,
        ACTIVATION=ACTIVATIONS[activation], IS_GATED=is_gated, ROWS=tiles.rows, COLUMNS=tiles.columns, BLOCK=block,
        IS_EVEN=depth % block == 0, PRECISION=triton_gemm.precision(arch), **triton_gemm.options(arch, tiles),
    )  # fmt: skip


def compile_cases() -> Iterator[CompileCase]:
    """Sizes are arguments: the cases of Mixtral-8x7B are those of every model whose depths are multiples of 128."""
    for arch in ARCHITECTURES:
        for dtype, table in ((torch.bfloat16, _TABLES[arch]), (torch.float32, _FLOAT32[arch])):
            for most, tiles in table.items():
                yield _case(arch, dtype, tiles, most, True)
                yield _case(arch, dtype, tiles, most, False)
    yield from triton_groups.compile_cases("Mixtral-8x7B", 8, 16)
    pointers = {"parts": "*fp32", "weights": "*fp32", "ids": "*i32", "out": "*bf16"}
    integers = dict.fromkeys(("num_experts", "top_k", "hidden"), "i32")
    yield CompileCase(
        "Mixtral-8x7B combine", _combine, pointers | integers, {"BLOCK": _SPAN}, aligned=(*pointers, "hidden"),
        extra_options=_UNFUSED,
    )  # fmt: skip


def _case(arch: str, dtype: torch.dtype, tiles: Tiles, most: int, is_gated: bool) -> CompileCase:
    pointer = POINTERS[dtype]
    pointers = {"x": pointer, "weight": pointer, "order": "*i32", "tiles": "*i32"}
    pointers["out"] = pointer if is_gated else "*fp32"
    integers = ("num_tiles", "num_columns", "depth", "x_stride", "top_k")
    return CompileCase(
        name=f"Mixtral-8x7B {'gate_up' if is_gated else 'down'} {pointer[1:]} {triton_gemm.class_name(most)} an expert",
        kernel=_kernel,
        signature=pointers | dict.fromkeys(integers, "i32"),
        constants={
            "ACTIVATION": ACTIVATIONS["silu"] if is_gated else 0, "IS_GATED": is_gated, "ROWS": tiles.rows,
            "COLUMNS": tiles.columns, "BLOCK": triton_gemm.block_for(arch, dtype), "IS_EVEN": True,
            "PRECISION": triton_gemm.precision(arch),
        },
        aligned=(*pointers, "num_columns", "depth", "x_stride"),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        uses_dot=True,
        extra_options={k: v for k, v in triton_gemm.options(arch, tiles).items() if not k.startswith("num_")},
        large=("weight",),
        architectures=(arch,),
    )  # fmt: skip
