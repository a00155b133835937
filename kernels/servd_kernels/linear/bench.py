"""Owns the measured cases of linear.
Does not know how they are timed."""

from collections.abc import Callable

import torch
from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.linear import OP, reference


def _case(rows: int, depth: int, columns: int, dtype: torch.dtype) -> Case:
    linear = OP.bind("cpu", dtype)

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        inputs = reference.make_inputs(rows, columns, depth, dtype=dtype, seed=seed)
        x, weight = inputs["x"], inputs["weight"]
        packed = linear.pack(weight)  # type: ignore[attr-defined]
        return lambda: linear(x, packed), lambda: functional.linear(x, weight)

    size = dtype.itemsize
    moved = size * (columns * depth + rows * (columns + depth))
    name = f"{rows}x{depth}x{columns} {str(dtype).removeprefix('torch.')}"
    return Case(name, make, moved, 2 * rows * columns * depth)


SHAPES = [(576, 1536), (576, 3072), (1536, 576), (576, 49152)]
CASES = [
    _case(rows, depth, columns, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for depth, columns in SHAPES
    for rows in (1, 8, 32, 128)
]
