"""Owns the measured cases of linear.
Does not know how they are timed."""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.linear import OP, PackedWeight, reference

SHAPES = [(576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152)]  # (in_features, out_features)
ROWS = [1, 8, 32, 128, 512]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


@functools.lru_cache(maxsize=1)
def _weights(depth: int, columns: int, dtype: torch.dtype) -> dict[int, tuple[torch.Tensor, PackedWeight]]:
    """The copies of one shape's weight, as torch takes it and packed: the cases of a shape share them."""
    return {}


def _case(rows: int, depth: int, columns: int, dtype: torch.dtype) -> Case:
    linear = OP.bind("cpu", dtype)
    inputs = functools.cache(lambda: reference.make_inputs(rows, 1, depth, dtype=dtype)["x"])

    def make(index: int) -> tuple[Callable[[], object], Callable[[], object]]:
        known = _weights(depth, columns, dtype)
        if index not in known:
            first = known[0][0].clone() if known else reference.make_inputs(1, columns, depth, dtype=dtype)["weight"]
            known[index] = (first, linear.pack(first))  # type: ignore[attr-defined]
        weight, packed = known[index]
        x = inputs()  # one for all: the op before has just written it, so that it lies in the cache
        return lambda: linear(x, packed), lambda: functional.linear(x, weight)

    name = str(dtype).removeprefix("torch.")
    moved = dtype.itemsize * (columns * depth + rows * (columns + depth))
    return Case(f"{rows}x{depth}x{columns} {name}", make, moved, 2 * rows * columns * depth, name)


CASES = [_case(rows, *shape, dtype) for dtype in DTYPES for shape in SHAPES for rows in ROWS]
