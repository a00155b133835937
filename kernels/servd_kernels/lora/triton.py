"""Owns the Triton low-rank update: rows sorted by adapter, then one kernel shrinks and one expands (SGMV).
Does not know how rows are sorted (triton_groups.py), nor how tiles are multiplied (triton_gemm.py)."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from servd_kernels import triton_gemm, triton_groups
from servd_kernels.triton_gemm import dot
from servd_kernels.triton_groups import Groups, tile_rows
from servd_kernels.triton_support import ARCHITECTURES, POINTERS, CompileCase, narrow, unsupported

MAX_RANK = 256
_SPLIT = 1024  # of K, in programs of their own: at fixed places, and added in ascending order
_COLUMNS = 64  # of y, of one program
_WARPS, _STAGES = 4, 2


def supports(device: str, dtype: torch.dtype, max_rank: int = 1, **axes: object) -> str | None:
    if max_rank > MAX_RANK:
        return f"max_rank must be at most {MAX_RANK}, not {max_rank}"
    return unsupported(device, dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _shrink(
    x, a, ranks, order, tiles, out, num_rows, depth, x_stride, max_rank,
    ROWS: tl.constexpr, RANKS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [splits, slices, num_rows in order, max_rank] = x A^T over one stretch of K, for one slice and tile."""
    adapter, place, row, mask = tile_rows(order, tiles, tl.program_id(0), ROWS)
    if adapter < 0:
        return
    piece, slices = tl.program_id(1), tl.num_programs(1)
    rank = tl.arange(0, RANKS)
    is_used = rank < tl.minimum(tl.load(ranks + adapter), max_rank)
    matrix = adapter.to(tl.int64) * slices + piece
    a_rows = a + (matrix * max_rank + rank)[:, None] * depth
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros([RANKS, ROWS], tl.float32)
    begin = tl.program_id(2) * SPLIT
    for start in range(begin, tl.minimum(begin + SPLIT, depth), BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        weights = tl.load(a_rows + column, mask=is_used[:, None] & (column < depth), other=0.0)
        tokens = tl.load(x_rows + column, mask=mask[:, None] & (column < depth), other=0.0)
        acc = dot(weights, tokens.T, acc, PRECISION)
    block = (tl.program_id(2) * slices + piece).to(tl.int64) * num_rows
    places = out + (block + place)[:, None] * max_rank + rank[None, :]
    tl.store(places, acc.T, mask=mask[:, None] & is_used[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _expand(
    y, shrunk, b, ranks, scalings, order, tiles, num_rows, first_column, end_column, num_columns, y_stride, max_rank,
    piece, slices, splits, ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y += scaling * (sum of the splits) B^T, for the columns of one slice."""
    adapter, place, row, mask = tile_rows(order, tiles, tl.program_id(0), ROWS)
    if adapter < 0:
        return
    if tl.load(ranks + adapter) <= 0:
        return  # -0 stays -0
    rank = tl.arange(0, RANKS)
    is_used = rank < tl.minimum(tl.load(ranks + adapter), max_rank)
    total = tl.zeros([ROWS, RANKS], tl.float32)
    for split in range(splits):
        block = (split * slices + piece).to(tl.int64) * num_rows
        some = shrunk + (block + place)[:, None] * max_rank + rank[None, :]
        total += tl.load(some, mask=mask[:, None] & is_used[None, :], other=0.0)
    column = first_column + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_inside = column < end_column
    b_rows = b + (adapter.to(tl.int64) * num_columns + column)[:, None] * max_rank + rank[None, :]
    weights = tl.load(b_rows, mask=is_inside[:, None] & is_used[None, :], other=0.0).to(tl.float32)
    update = dot(weights, total.T, tl.zeros([COLUMNS, ROWS], tl.float32), PRECISION).T
    places = y + row.to(tl.int64)[:, None] * y_stride + column[None, :]
    written = mask[:, None] & is_inside[None, :]
    values = tl.load(places, mask=written, other=0.0).to(tl.float32) + tl.load(scalings + adapter) * update
    tl.store(places, narrow(values, y.dtype.element_ty), mask=written)


def run(
    y: torch.Tensor,
    x: torch.Tensor,
    adapter_ids: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scalings: torch.Tensor,
    slices: Sequence[int],
) -> None:
    if not (y.numel() and a.numel()):
        return
    arch = triton_gemm.architecture_of(y.device)
    rows, (adapters, parts, max_rank, depth) = len(y), a.shape
    height = _tile_rows(triton.cdiv(rows, adapters))
    groups = triton_groups.sort_rows(adapter_ids, adapters, height)
    splits = triton.cdiv(depth, _SPLIT)
    shrunk = torch.empty(splits, parts, rows, max_rank, device=y.device)
    options = _options(arch)
    _shrink[(groups.num_tiles, parts, splits)](
        x, a, ranks, groups.order, groups.tiles, shrunk, rows, depth, x.stride(0), max_rank,
        ROWS=height, RANKS=_padded(max_rank), SPLIT=_SPLIT, BLOCK=triton_gemm.block_for(arch, x.dtype),
        PRECISION=triton_gemm.precision(arch), **options,
    )  # fmt: skip
    for piece, (width, end) in enumerate(zip(slices, accumulate(slices), strict=True)):
        if width:
            _expand_slice(arch, y, shrunk, b, ranks, scalings, groups, height, piece, end - width, end)


def _expand_slice(
    arch: str, y: torch.Tensor, shrunk: torch.Tensor, b: torch.Tensor, ranks: torch.Tensor, scalings: torch.Tensor,
    groups: Groups, height: int, piece: int, begin: int, end: int,
) -> None:  # fmt: skip
    splits, parts, rows, max_rank = shrunk.shape
    _expand[(groups.num_tiles, triton.cdiv(end - begin, _COLUMNS))](
        y, shrunk, b, ranks, scalings, groups.order, groups.tiles, rows, begin, end, y.shape[1], y.stride(0), max_rank,
        piece, parts, splits, ROWS=height, RANKS=_padded(max_rank), COLUMNS=_COLUMNS,
        PRECISION=triton_gemm.precision(arch), **_options(arch),
    )  # fmt: skip


def _tile_rows(mean: int) -> int:
    """Of a tile, by the mean rows of an adapter. The adapters' matrices are the left operand: bits do not depend."""
    return 16 if mean <= 32 else 64


def _padded(max_rank: int) -> int:
    """The least that tensor cores take is 16."""
    return 1 << max(4, (max_rank - 1).bit_length())


def _options(arch: str) -> dict[str, object]:
    return triton_gemm.options(arch, triton_gemm.Tiles(_COLUMNS, 16, _WARPS, _STAGES))


def compile_cases() -> Iterator[CompileCase]:
    """Sizes are arguments: the cases of Llama-3-8B are those of every model; the rank's class is a constant."""
    for arch in ARCHITECTURES:
        for max_rank in (16, 64):
            for rows in (16, 64):
                yield _case(arch, max_rank, rows, torch.bfloat16, True)
                yield _case(arch, max_rank, rows, torch.bfloat16, False)
        yield _case(arch, 16, 16, torch.float32, True)
    yield from triton_groups.compile_cases("Llama-3-8B", 64, 16)


def _case(arch: str, max_rank: int, rows: int, dtype: torch.dtype, shrinks: bool) -> CompileCase:
    pointer = POINTERS[dtype]
    names = ("x", "a", "ranks", "order", "tiles", "out") if shrinks else (
        "y", "shrunk", "b", "ranks", "scalings", "order", "tiles"
    )  # fmt: skip
    others = {"ranks": "*i32", "order": "*i32", "tiles": "*i32", "out": "*fp32", "shrunk": "*fp32", "scalings": "*fp32"}
    pointers = {name: others.get(name, pointer) for name in names}
    integers = ("num_rows", "depth", "x_stride", "max_rank") if shrinks else (
        "num_rows", "first_column", "end_column", "num_columns", "y_stride", "max_rank", "piece", "slices", "splits"
    )  # fmt: skip
    sizes = {"SPLIT": _SPLIT, "BLOCK": triton_gemm.block_for(arch, dtype)} if shrinks else {"COLUMNS": _COLUMNS}
    ragged = ("num_rows", "piece", "slices", "splits")
    return CompileCase(
        name=f"Llama-3-8B {'shrink' if shrinks else 'expand'} {pointer[1:]} rank {max_rank} tiles of {rows}",
        kernel=_shrink if shrinks else _expand,
        signature=pointers | dict.fromkeys(integers, "i32"),
        constants={"ROWS": rows, "RANKS": max_rank, "PRECISION": triton_gemm.precision(arch)} | sizes,
        aligned=(*pointers, *(integer for integer in integers if integer not in ragged)),
        num_warps=_WARPS,
        num_stages=_STAGES,
        uses_dot=True,
        extra_options={k: v for k, v in _options(arch).items() if not k.startswith("num_")},
        architectures=(arch,),
    )
