"""Owns the measured cases of linear_wna16.
Does not know how they are timed."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.linear.bench import ROWS, SHAPES
from servd_kernels.linear_wna16 import PackedWeight, pack, reference


@functools.lru_cache(maxsize=1)
def _weights(
    depth: int, columns: int, bits: int, group: int, symmetric: bool, activations: str
) -> list[tuple[torch.Tensor, PackedWeight]]:
    """The copies of one shape's weight, dense in bfloat16 and packed: the cases of a shape share them."""
    weight = reference.make_inputs(1, columns, depth, bits, group, symmetric)["weight"]
    return [(weight.dequantize().bfloat16(), pack(weight, activations))]


def _case(rows: int, depth: int, columns: int, bits: int, group: int, symmetric: bool, activations: str) -> Case:
    def make(index: int) -> tuple[Callable[[], object], Callable[[], object]]:
        known = _weights(depth, columns, bits, group, symmetric, activations)
        while len(known) <= index:
            dense, packed = known[0]
            known.append((dense.clone(), dataclasses.replace(packed, data=packed.data.clone())))
        dense, packed = known[index]
        x = reference.make_inputs(rows, 1, depth, dtype=torch.bfloat16, seed=index)["x"]
        return lambda: packed.run(x, packed), lambda: functional.linear(x, dense)

    kind = "" if symmetric else " zeros"
    name = f"{rows}x{depth}x{columns} int{bits}/{group}{kind} x {activations}"
    groups = -(-depth // group)
    moved = columns * (depth * bits // 8 + groups * (2 if symmetric else 3)) + 2 * rows * (columns + depth)
    unit = "bfloat16" if activations == "none" else "int8"
    return Case(name, make, moved, 2 * rows * columns * depth, unit)


CASES = [
    _case(rows, *shape, bits, group, symmetric, activations)
    for bits, group, symmetric, activations in (
        (4, 64, True, "none"),
        (4, 128, False, "none"),
        (8, 64, True, "none"),
        (4, 64, True, "int8"),
        (4, 32, False, "int8"),  # Q4_1 of GGUF
        (8, 32, True, "int8"),  # Q8_0
        (8, 16, True, "int8"),  # Q6_K
    )
    for shape in SHAPES
    for rows in ROWS
]
