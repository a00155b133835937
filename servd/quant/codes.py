"""Parts of matrices, coded or plain: cut out, put together, read as floats a piece at a time.

Knows nothing of layers or ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor
from torch.nn import functional

from servd.errors import ConfigError

# Elements turned at a time: their float32 forms stay in the second-level cache, and never add up to a second model.
_CHUNK_ELEMENTS = 1 << 18


Part = Tensor | GroupedWeight  # of a matrix, [rows, columns]: plain or coded


def num_rows(part: Part) -> int:
    return len(part if isinstance(part, Tensor) else part.codes)


def fieldwise(change: Callable[..., Tensor], *weights: GroupedWeight) -> GroupedWeight:
    """`change` of the matrices' codes, of their scales, and of their zeros or minima if they have those."""

    def changed(name: str) -> Tensor | None:
        tensors = [getattr(weight, name) for weight in weights]
        return None if tensors[0] is None else change(*tensors)

    codes, scales = changed("codes"), changed("scales")
    assert codes is not None and scales is not None
    return dataclasses.replace(weights[0], codes=codes, scales=scales, zeros=changed("zeros"), minima=changed("minima"))


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


def form(part: Part) -> tuple[object, ...] | None:
    """What two parts must have in common to be one matrix; None: that they are plain."""
    if isinstance(part, Tensor):
        return None
    zeros, minima = part.zeros is not None, part.minima is not None
    return part.bits, part.group_size, part.scales.dtype, zeros, minima


def stack(parts: Sequence[Part]) -> Part:
    """Parts of one form, one above the other."""
    if len(parts) == 1:
        return parts[0]
    coded = [part for part in parts if isinstance(part, GroupedWeight)]
    if coded:
        return fieldwise(lambda *tensors: torch.cat(tensors), *coded)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def with_zero_rows(part: Part, count: int) -> Part:
    """The part with so many rows of zeros below it: with scales and minima of 0, all codes stand for 0."""

    def padded(tensor: Tensor) -> Tensor:
        return functional.pad(tensor, (0, 0, 0, count))

    return padded(part) if isinstance(part, Tensor) else fieldwise(padded, part)


def float_rows(part: Part, kept: slice = slice(None)) -> Iterator[tuple[slice, Tensor]]:
    """The kept rows of a part in float32, a few at a time, and which of the kept ones they are."""
    matrix = part if isinstance(part, Tensor) else part.codes
    first, last, _ = kept.indices(len(matrix))
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    for begin in range(first, max(first + 1, last), step):  # one piece at least: it tells the form
        end = min(begin + step, last)
        rows = slice(begin, end)
        values = part[rows].float() if isinstance(part, Tensor) else cut(part, rows, slice(None)).dequantize()
        yield slice(begin - first, end - first), values
