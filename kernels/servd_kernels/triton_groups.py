"""Owns the rows of a batch sorted by group (an expert, an adapter) and cut into tiles, on the device.
Does not know what a group's rows are multiplied by. No number of it is ever needed by the host, which would wait."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from servd_kernels.triton_support import INTERPRETED, CompileCase

_BLOCK = 64 if INTERPRETED else 1024  # ids of one step
_GROUP = tl.constexpr(8)  # tiles of rows that share a tile of the weights while it is in the L2


@dataclass(frozen=True, slots=True)
class Groups:
    """`order` int32 [num_rows]: row numbers by group, ascending within one; rows of no group are left out.
    `tiles` int32 [num_tiles, 3]: group, first place in the order, and the group's end; group -1: nothing to do.
    """

    order: torch.Tensor
    tiles: torch.Tensor

    @property
    def num_tiles(self) -> int:
        return len(self.tiles)


@triton.jit
def _count(ids, counts, num_rows, BLOCK: tl.constexpr):
    group = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += (tl.load(ids + row, mask=row < num_rows, other=-1) == group).to(tl.int32)
    tl.store(counts + group, tl.sum(total, 0))


@triton.jit
def _place(
    ids, counts, order, tiles, num_rows, num_groups, num_tiles,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a group, and one more for the tiles that are left over."""
    group = tl.program_id(0)
    other = tl.arange(0, GROUPS)
    sizes = tl.load(counts + other, mask=other < tl.minimum(group, num_groups), other=0)
    first = tl.sum(sizes, 0)
    tile = tl.sum((sizes + ROWS - 1) // ROWS, 0)
    size = tl.load(counts + group, mask=group < num_groups, other=0)
    end = first + size
    last_tile = tile + (size + ROWS - 1) // ROWS
    mark = group
    if group == num_groups:
        last_tile = num_tiles
        mark = -1
    for start in range(tile, last_tile, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < last_tile
        tl.store(tiles + place * 3, mark + tl.zeros([BLOCK], tl.int32), mask=inside)
        tl.store(tiles + place * 3 + 1, first + (place - tile) * ROWS, mask=inside)
        tl.store(tiles + place * 3 + 2, end + tl.zeros([BLOCK], tl.int32), mask=inside)
    if size > 0:
        for start in range(0, num_rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            is_mine = tl.load(ids + row, mask=row < num_rows, other=-1) == group
            ones = is_mine.to(tl.int32)
            tl.store(order + first + tl.cumsum(ones, 0) - 1, row, mask=is_mine)
            first += tl.sum(ones, 0)


def sort_rows(ids: torch.Tensor, num_groups: int, tile_rows: int) -> Groups:
    """ids int32 [num_rows], contiguous: each row's group; none if outside 0..num_groups - 1."""
    num_rows = ids.numel()
    num_tiles = num_rows // tile_rows + min(num_groups, num_rows)  # at most
    order = ids.new_empty(num_rows)
    tiles = ids.new_empty(num_tiles, 3)
    if num_tiles:
        counts = ids.new_empty(num_groups)
        _count[(num_groups,)](ids, counts, num_rows, BLOCK=_BLOCK)
        _place[(num_groups + 1,)](
            ids, counts, order, tiles, num_rows, num_groups, num_tiles,
            ROWS=tile_rows, GROUPS=triton.next_power_of_2(num_groups), BLOCK=_BLOCK,
        )  # fmt: skip
    return Groups(order, tiles)


@triton.jit
def program_tile(num_tiles, column_tiles):
    """(tile of rows, tile of columns) of this program: a few tiles of rows go through the columns together."""
    program = tl.program_id(0)
    first = program // (_GROUP * column_tiles) * _GROUP
    size = tl.minimum(num_tiles - first, _GROUP)
    inside = program % (_GROUP * column_tiles)
    return first + inside % size, inside // size


@triton.jit
def tile_rows(order, tiles, tile, ROWS: tl.constexpr):
    """(group, place, row, mask) of a tile: a place beyond the group's end is its last, which must not be stored."""
    group = tl.load(tiles + tile * 3)
    place = tl.load(tiles + tile * 3 + 1) + tl.arange(0, ROWS)
    end = tl.load(tiles + tile * 3 + 2)
    mask = place < end
    place = tl.minimum(place, end - 1)
    return group, place, tl.load(order + place, mask=mask, other=0), mask


def compile_cases(name: str, num_groups: int, rows: int) -> Iterator[CompileCase]:
    """Of the sort, for an op's groups and height of tile."""
    pointers = dict.fromkeys(("ids", "counts"), "*i32")
    yield CompileCase(
        f"{name} count", _count, pointers | {"num_rows": "i32"}, {"BLOCK": _BLOCK}, aligned=tuple(pointers)
    )
    pointers |= dict.fromkeys(("order", "tiles"), "*i32")
    yield CompileCase(
        f"{name} place",
        _place,
        pointers | dict.fromkeys(("num_rows", "num_groups", "num_tiles"), "i32"),
        {"ROWS": rows, "GROUPS": triton.next_power_of_2(num_groups), "BLOCK": _BLOCK},
        aligned=tuple(pointers),
    )
