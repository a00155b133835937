"""Owns the measured cases of linear_fp8.
Does not know how they are timed."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.linear.bench import ROWS, SHAPES
from servd_kernels.linear_fp8 import PackedWeight, pack, reference


@functools.lru_cache(maxsize=1)
def _weights(depth: int, columns: int, activations: str) -> list[tuple[torch.Tensor, PackedWeight]]:
    """The copies of one shape's weight, dense in bfloat16 and packed: the cases of a shape share them."""
    inputs = reference.make_inputs(1, columns, depth)
    return [(inputs["weight"].bfloat16(), pack(inputs["codes"], inputs["scales"], activations))]


def _case(rows: int, depth: int, columns: int, activations: str) -> Case:
    def make(index: int) -> tuple[Callable[[], object], Callable[[], object]]:
        known = _weights(depth, columns, activations)
        while len(known) <= index:
            dense, packed = known[0]
            known.append((dense.clone(), dataclasses.replace(packed, data=packed.data.clone())))
        dense, packed = known[index]
        x = reference.make_inputs(rows, 1, depth, dtype=torch.bfloat16, seed=index)["x"]
        return lambda: packed.run(x, packed, None, None, None, None), lambda: functional.linear(x, dense)

    moved = columns * (depth + 4) + 2 * rows * (columns + depth)
    return Case(f"{rows}x{depth}x{columns} x {activations}", make, moved, 2 * rows * columns * depth, "bfloat16")


CASES = [_case(rows, *shape, activations) for activations in ("none", "fp8") for shape in SHAPES for rows in ROWS]
