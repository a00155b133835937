"""Parts of coded matrices: cut out, put together, made from floats a piece at a time.

Knows nothing of layers or ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor
from torch.nn import functional

from servd.errors import ConfigError

# Elements turned at a time: their float32 forms stay in the second-level cache, and never add up to a second model.
_CHUNK_ELEMENTS = 1 << 18


def cut(weight: GroupedWeight, rows: slice, columns: slice) -> GroupedWeight:
    """Some rows and columns of a coded matrix. Raises ConfigError if the columns cut a group in two."""
    width, size = weight.codes.shape[1], weight.group_size
    first, last, _ = columns.indices(width)
    if first % size or (last % size and last < width):
        raise ConfigError(f"columns {first} to {last} of {width} are asked for; allowed: whole groups of {size}")
    groups = slice(first // size, -(-last // size))
    return dataclasses.replace(
        weight,
        codes=weight.codes[rows, columns],
        scales=weight.scales[rows, groups],
        zeros=None if weight.zeros is None else weight.zeros[rows, groups],
        minima=None if weight.minima is None else weight.minima[rows, groups],
    )


def form(weight: GroupedWeight) -> tuple[object, ...]:
    """What two coded matrices must have in common to be one."""
    zeros, minima = weight.zeros is not None, weight.minima is not None
    return weight.bits, weight.group_size, weight.scales.dtype, zeros, minima


def stack(weights: Sequence[GroupedWeight]) -> GroupedWeight:
    """Matrices of one form, one above the other."""
    if len(weights) == 1:
        return weights[0]

    def stacked(name: str) -> Tensor | None:
        tensors = [getattr(weight, name) for weight in weights]
        return None if tensors[0] is None else torch.cat(tensors)

    codes, scales = stacked("codes"), stacked("scales")
    assert codes is not None and scales is not None
    return dataclasses.replace(weights[0], codes=codes, scales=scales, zeros=stacked("zeros"), minima=stacked("minima"))


def with_zero_rows(weight: GroupedWeight, count: int) -> GroupedWeight:
    """The matrix with so many rows of zeros below it: with scales and minima of 0, all codes stand for 0."""
    if count == 0:
        return weight

    def padded(tensor: Tensor) -> Tensor:
        return functional.pad(tensor, (0, 0, 0, count))

    return dataclasses.replace(
        weight,
        codes=padded(weight.codes),
        scales=padded(weight.scales),
        zeros=None if weight.zeros is None else padded(weight.zeros),
        minima=None if weight.minima is None else padded(weight.minima),
    )


def float_rows(weight: Tensor | GroupedWeight, kept: slice = slice(None)) -> Iterator[tuple[slice, Tensor]]:
    """The kept rows of a matrix in float32, a few at a time, and which of the kept ones they are."""
    matrix = weight if isinstance(weight, Tensor) else weight.codes
    first, last, _ = kept.indices(len(matrix))
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    for begin in range(first, max(first + 1, last), step):  # one piece at least: it tells the form
        end = min(begin + step, last)
        rows = slice(begin, end)
        values = weight[rows].float() if isinstance(weight, Tensor) else cut(weight, rows, slice(None)).dequantize()
        yield slice(begin - first, end - first), values
