"""Owns the measured cases of linear_w8a8.
Does not know how they are timed."""

import dataclasses
import functools
from collections.abc import Callable

import torch

from servd_kernels.bench import Case
from servd_kernels.linear.bench import ROWS, SHAPES
from servd_kernels.linear_w8a8 import PackedWeight, pack, reference


@functools.lru_cache(maxsize=1)
def _weights(
    depth: int, columns: int, group: int | None, rotation: int | None
) -> list[tuple[torch.Tensor, PackedWeight]]:
    """The copies of one shape's weight, as torch takes it and packed: the cases of a shape share them."""
    inputs = reference.make_inputs(1, columns, depth)
    return [(inputs["codes"], pack(inputs["codes"], inputs["scales"], group, rotation=rotation))]


def _case(rows: int, depth: int, columns: int, group: int | None, rotation: int | None) -> Case:
    def make(index: int) -> tuple[Callable[[], object], Callable[[], object]]:
        known = _weights(depth, columns, group, rotation)
        while len(known) <= index:
            codes, packed = known[0]
            known.append((codes.clone(), dataclasses.replace(packed, data=packed.data.clone())))
        codes, packed = known[index]
        x = reference.make_inputs(rows, 1, depth, dtype=torch.bfloat16, seed=index)["x"]
        # torch's call is the product of integers alone: our activations are rounded and scaled besides.
        x_codes, transposed = torch.randint(-127, 128, x.shape, dtype=torch.int8), codes.T
        return lambda: packed.run(x, packed), lambda: torch._int_mm(x_codes, transposed)

    name = f"{rows}x{depth}x{columns} group {group or 'row'}{' rotated' if rotation else ''}"
    moved = columns * (depth + 4) + 2 * rows * (columns + depth)
    return Case(name, make, moved, 2 * rows * columns * depth, "int8")


CASES = [
    _case(rows, *shape, group, rotation)
    for group, rotation in ((None, None), (None, 64), (64, None))
    for shape in SHAPES
    for rows in ROWS
]
