"""Owns what the Triton linears share: tiles by architecture and rows, the product of two tiles, and what follows it.
Does not know any op, nor coded weights (triton_gemm_codes.py).

A tile of the weight is always the left operand and the tokens are the right one: out.T = weight @ x.T. Tensor cores
take 64 rows on the left (wgmma, tcgen05) but as few as 8 on the right, so that one token and a thousand meet the same
instruction, the same depth of it and the same order of steps: that is what keeps a token's bits whatever the batch.
Depth is never split, and its block does not depend on the number of tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from servd_kernels.triton_support import INTERPRETED, CompileCase, architecture, narrow

GROUP = 8  # tiles of tokens that share a tile of the weight while it is in the L2
BLOCK_BYTES = 128  # of depth in a step: what TMA swizzles, and a cache line
HAVE_TMA = ("sm_90", "sm_100")
INTERPRETER = "interpreter"  # a row of the tables: the tests' time is in the number of steps

_GROUP = tl.constexpr(GROUP)
_INTERPRETED = tl.constexpr(INTERPRETED)


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program computes, and with how many warps and steps in flight."""

    columns: int  # of the output: rows of the weight
    rows: int  # of the output: tokens
    warps: int
    stages: int


# What a case to compile has after its product, and a depth that fills its steps.
PLAIN_END: Mapping[str, Any] = {"bias": None, "ACTIVATION": 0, "IS_EVEN": True}

# By the most rows that a class takes. Few rows: narrow columns, so that there are programs enough to fill the card,
# and many steps in flight, because the weight streams from memory. The rest: tiles as large as the registers hold.
Table = Mapping[int, Tiles]
MANY = 1 << 62
PLAIN: dict[str, Table] = {
    "sm_80": {16: Tiles(32, 16, 4, 8), 64: Tiles(64, 64, 4, 5), MANY: Tiles(128, 128, 8, 4)},
    "sm_90": {16: Tiles(64, 16, 4, 8), 64: Tiles(64, 64, 4, 6), MANY: Tiles(128, 256, 8, 4)},
    "sm_100": {16: Tiles(64, 16, 4, 8), 64: Tiles(64, 64, 4, 6), MANY: Tiles(128, 256, 8, 4)},
    "gfx942": {16: Tiles(64, 16, 4, 2), 64: Tiles(64, 64, 4, 2), MANY: Tiles(128, 128, 8, 2)},
    INTERPRETER: {16: Tiles(128, 16, 4, 1), 64: Tiles(128, 64, 4, 1), MANY: Tiles(128, 128, 4, 1)},
}
INTEGER: dict[str, Table] = PLAIN | {  # int32 sums, which sm_100 turns into as many registers of float32
    "sm_100": {16: Tiles(64, 16, 8, 8), 64: Tiles(64, 64, 4, 6), MANY: Tiles(128, 128, 8, 4)},
}
GATED: dict[str, Table] = {  # columns of the gate, and as many of the up matrix
    "sm_80": {16: Tiles(32, 16, 4, 6), 64: Tiles(64, 64, 4, 4), MANY: Tiles(64, 128, 8, 4)},
    "sm_90": {16: Tiles(64, 16, 4, 6), 64: Tiles(64, 64, 4, 5), MANY: Tiles(128, 128, 8, 4)},
    "sm_100": {16: Tiles(64, 16, 4, 6), 64: Tiles(64, 64, 4, 5), MANY: Tiles(128, 128, 8, 4)},
    "gfx942": {16: Tiles(64, 16, 4, 2), 64: Tiles(64, 64, 4, 2), MANY: Tiles(64, 128, 8, 2)},
    INTERPRETER: {16: Tiles(128, 16, 4, 1), 64: Tiles(128, 64, 4, 1), MANY: Tiles(128, 128, 4, 1)},
}
GROUPED: dict[str, Table] = {  # two accumulators: a group's sum, and the total
    "sm_80": {16: Tiles(32, 16, 4, 6), 64: Tiles(64, 64, 4, 4), MANY: Tiles(128, 128, 8, 4)},
    "sm_90": {16: Tiles(64, 16, 4, 8), 64: Tiles(64, 64, 4, 5), MANY: Tiles(128, 128, 8, 4)},
    "sm_100": {16: Tiles(64, 16, 8, 8), 64: Tiles(64, 64, 4, 5), MANY: Tiles(128, 64, 8, 4)},
    "gfx942": {16: Tiles(64, 16, 4, 2), 64: Tiles(64, 64, 4, 2), MANY: Tiles(128, 128, 8, 2)},
    INTERPRETER: {16: Tiles(128, 16, 4, 1), 64: Tiles(128, 64, 4, 1), MANY: Tiles(128, 128, 4, 1)},
}
CODED: dict[str, Table] = {  # codes take a quarter or half of the weight's bytes: more steps in flight
    "sm_80": {16: Tiles(32, 16, 2, 8), 64: Tiles(64, 64, 4, 4), MANY: Tiles(128, 128, 8, 3)},
    "sm_90": {16: Tiles(64, 16, 4, 8), 64: Tiles(64, 64, 4, 5), MANY: Tiles(128, 128, 8, 4)},
    "sm_100": {16: Tiles(64, 16, 4, 8), 64: Tiles(64, 64, 4, 5), MANY: Tiles(128, 128, 8, 4)},
    "gfx942": {16: Tiles(64, 16, 4, 2), 64: Tiles(64, 64, 4, 2), MANY: Tiles(64, 128, 8, 2)},
    INTERPRETER: {16: Tiles(128, 16, 4, 1), 64: Tiles(128, 64, 4, 1), MANY: Tiles(128, 128, 4, 1)},
}
SUMMED: dict[str, Table] = {  # three: a group's sum, the sum of x in it, and the total
    "sm_80": {16: Tiles(32, 16, 2, 6), 64: Tiles(32, 64, 4, 4), MANY: Tiles(32, 64, 4, 4)},
    "sm_90": {16: Tiles(64, 16, 4, 8), 64: Tiles(64, 64, 4, 5), MANY: Tiles(64, 128, 8, 4)},
    "sm_100": {16: Tiles(64, 16, 4, 8), MANY: Tiles(64, 64, 8, 5)},
    "gfx942": {16: Tiles(64, 16, 4, 2), 64: Tiles(64, 64, 4, 2), MANY: Tiles(64, 128, 8, 2)},
    INTERPRETER: {16: Tiles(128, 16, 4, 1), 64: Tiles(128, 64, 4, 1), MANY: Tiles(128, 128, 4, 1)},
}
FLOAT32: dict[str, Table] = {  # three products of halves a step: registers for half the tile
    arch: {16: Tiles(64, 16, 4, stages), MANY: Tiles(64, 64, 4, stages)}
    for arch, stages in {"sm_80": 4, "sm_90": 4, "sm_100": 4, "gfx942": 2, INTERPRETER: 1}.items()
}


def tiles_for(table: Table, num_rows: int) -> Tiles:
    return next(tiles for most, tiles in table.items() if num_rows <= most)


def architecture_of(device: torch.device) -> str:
    """The row of the tables for this device."""
    return INTERPRETER if INTERPRETED else architecture(device)


def block_for(arch: str, dtype: torch.dtype) -> int:
    """Columns of depth in a step. Bits may depend on it: one for all tiles."""
    return (4 if arch == INTERPRETER else 1) * BLOCK_BYTES // dtype.itemsize


def class_name(most: int) -> str:
    return "M > 64" if most == MANY else f"M <= {most}"


def options(arch: str, tiles: Tiles) -> dict[str, Any]:
    """Compiler options. Products and sums are fused by hand alone: a compiler's choice could differ between tiles."""
    fixed: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False}
    # AMD's compiler would take 32x32x8 for large tiles and 16x16x16 for small ones: sums in another order.
    return fixed | ({"matrix_instr_nonkdim": 16} if arch == "gfx942" else {})


def precision(arch: str) -> str:
    """How float32 is multiplied: NVIDIA's tensor cores take 11 bits at a time, AMD's take float32 as it is."""
    return "ieee" if arch == "gfx942" else "tf32x3"


def takes_descriptors(arch: str, *matrices: torch.Tensor) -> bool:
    """Whether TMA can copy tiles of these matrices: bases, and rows, at multiples of 16 bytes."""
    return arch in HAVE_TMA and all(
        matrix.numel() and matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
        for matrix in matrices
    )


def descriptor(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix to be read in tiles; beyond its edges there are zeros."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def with_unit_columns(x: torch.Tensor) -> torch.Tensor:
    """x with its columns one element apart."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def operands(
    arch: str, tiles: Tiles, block: int, x: torch.Tensor, weight: torch.Tensor
) -> tuple[bool, tuple[torch.Tensor | TensorDescriptor, torch.Tensor | TensorDescriptor]]:
    """Whether TMA can read x [num_rows, depth] and weight [num_columns, depth]; and both, as `product` takes them."""
    if not takes_descriptors(arch, x, weight):
        return False, (x, weight)
    return True, (descriptor(x, tiles.rows, block), descriptor(weight, tiles.columns, block))


def operand_types(arch: str, tiles: Tiles, block: int, pointer: str) -> dict[str, str]:
    """The same, as types of a case to compile."""
    if arch not in HAVE_TMA:
        return {"x": pointer, "weight": pointer}
    return {
        name: f"tensordesc<{pointer[1:]}[{size}, {block}]>"
        for name, size in (("x", tiles.rows), ("weight", tiles.columns))
    }


def case(
    name: str, arch: str, tiles: Tiles, kernel: Any, types: Mapping[str, str], integers: tuple[str, ...],
    constants: Mapping[str, Any],
) -> CompileCase:  # fmt: skip
    """A case to compile of a kernel of products; integers, but for num_rows, are multiples of 16."""
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={**types, **dict.fromkeys(integers, "i32")},
        constants=constants,
        aligned=(*types, *(integer for integer in integers if integer != "num_rows")),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        uses_dot=True,
        extra_options={k: v for k, v in options(arch, tiles).items() if not k.startswith("num_")},
        architectures=(arch,),
    )


def grid(tiles: Tiles, num_rows: int, num_columns: int) -> tuple[int]:
    return (triton.cdiv(num_rows, tiles.rows) * triton.cdiv(num_columns, tiles.columns),)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32, or in int32 where both are int8. Triton 3.9's interpreter multiplies the bit patterns of
    bfloat16, and its BLAS sums an element by its place in the tile: it takes float64, where no order shows."""
    if a.dtype.is_int():
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    if _INTERPRETED:
        wide = tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64), acc.to(tl.float64))
        return wide.to(tl.float32)
    if a.dtype.is_fp8():  # Hopper's sums of e4m3 keep 14 bits: after 128 columns they are added in float32
        return tl.dot(a, b, acc, max_num_imprecise_acc=128)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def program_tile(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """(first row, first column) of this program: groups of row tiles go through the columns together."""
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    column_tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    first = program // (_GROUP * column_tiles) * _GROUP
    size = tl.minimum(row_tiles - first, _GROUP)
    inside = program % (_GROUP * column_tiles)
    return (first + inside % size) * BLOCK_ROWS, inside // size * BLOCK_COLUMNS


@triton.jit
def row_pointers(matrix, first, num_rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers [ROWS, COLUMNS] to the first columns; a row beyond the last is the last, whose result is not stored."""
    row = tl.minimum(first + tl.arange(0, ROWS), num_rows - 1)
    return matrix + row.to(tl.int64)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_columns(pointers, start, depth, COLUMNS: tl.constexpr, IS_EVEN: tl.constexpr):
    """Columns start.. of the rows pointed to; zeros beyond the depth."""
    if IS_EVEN:
        return tl.load(pointers + start)
    return tl.load(pointers + start, mask=(start + tl.arange(0, COLUMNS) < depth)[None, :], other=0)


@triton.jit
def product(
    x, weight, row, column, num_rows, num_columns, depth, x_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_GATED: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr, IS_EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weight[column..] @ x[row..].T, float32 or int32 [COLUMNS, ROWS]; and the same of the matrix below the weight's
    num_columns rows where IS_GATED (else the first again). x and weight are pointers, or descriptors."""
    IS_INTEGER: tl.constexpr = x.dtype.is_int() if HAS_DESCRIPTORS else x.dtype.element_ty.is_int()
    acc = tl.zeros([COLUMNS, ROWS], tl.int32 if IS_INTEGER else tl.float32)
    other = acc
    if not HAS_DESCRIPTORS:
        x_rows = row_pointers(x, row, num_rows, x_stride, ROWS, BLOCK)
        weight_rows = row_pointers(weight, column, num_columns, weight_stride, COLUMNS, BLOCK)
        if IS_GATED:
            below = weight + tl.cast(num_columns, tl.int64) * weight_stride
            other_rows = row_pointers(below, column, num_columns, weight_stride, COLUMNS, BLOCK)
    for start in range(0, depth, BLOCK):
        if HAS_DESCRIPTORS:
            tokens = x.load([row, start]).T
            acc = dot(weight.load([column, start]), tokens, acc, PRECISION)
            if IS_GATED:
                other = dot(weight.load([num_columns + column, start]), tokens, other, PRECISION)
        else:
            tokens = load_columns(x_rows, start, depth, BLOCK, IS_EVEN).T
            acc = dot(load_columns(weight_rows, start, depth, BLOCK, IS_EVEN), tokens, acc, PRECISION)
            if IS_GATED:
                other = dot(load_columns(other_rows, start, depth, BLOCK, IS_EVEN), tokens, other, PRECISION)
    return acc, other


@triton.jit
def _times_sigmoid(x, y):
    """x * sigmoid(y). Beyond the clamp the result is 0 already, and the exponential would overflow."""
    return x / (1.0 + tl.exp(tl.minimum(-y, 88.0)))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of linear.packed.ACTIVATIONS, in float32."""
    if ACTIVATION == 1:
        x = _times_sigmoid(x, x)
    elif ACTIVATION == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:
        # 0.5 x (1 + tanh(u)) = x * sigmoid(2u)
        x = _times_sigmoid(x, x * (1.5957691216057308 + 0.07135481283 * x * x))
    return x


@triton.jit
def add_row(values, source, column, num_columns, COLUMNS: tl.constexpr):
    """values [ROWS, COLUMNS] plus a row of the matrix's width; None adds nothing."""
    if source is not None:
        place = column + tl.arange(0, COLUMNS)
        values += tl.load(source + place, mask=place < num_columns, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def scale_tile(values, x_scales, scales, row, column, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """values [ROWS, COLUMNS] times a scale of each row, then of each column; None is 1."""
    if x_scales is not None:
        token = row + tl.arange(0, ROWS)
        values *= tl.load(x_scales + token, mask=token < num_rows, other=0.0)[:, None]
    if scales is not None:
        place = column + tl.arange(0, COLUMNS)
        values *= tl.load(scales + place, mask=place < num_columns, other=0.0)[None, :]
    return values


@triton.jit
def store_tile(
    values, out, residual, residual_stride, row, column, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """values float32 [ROWS, COLUMNS] plus the residual, rounded once, to out (contiguous)."""
    token = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    place = (column + tl.arange(0, COLUMNS))[None, :]
    mask = (token < num_rows) & (place < num_columns)
    if residual is not None:
        values += tl.load(residual + token * residual_stride + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * num_columns + place, narrow(values, out.dtype.element_ty), mask=mask)
