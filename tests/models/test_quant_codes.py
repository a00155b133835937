"""Parts of matrices in every form that files have: what is cut out and put together stands for the same floats.

Knows nothing of layers (test_quant_methods) or of files.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from servd_kernels.linear_wna16 import GroupedWeight, quantize_weight
from torch import Tensor

from servd.errors import ConfigError
from servd.quant.codes import Part, cut, float_rows, form, num_rows, stack, with_zero_rows

COLUMNS = 80  # the last group of 32 is shorter


def part(name: str, rows: int = 12) -> Part:
    """plain, with neither zeros nor minima, with zeros, with minima."""
    weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows))
    if name == "plain":
        return weight
    coded = quantize_weight(weight, 4, 32, symmetric=name == "symmetric")
    if name == "minima":
        assert coded.zeros is not None
        return dataclasses.replace(coded, zeros=None, minima=-coded.zeros.float() * coded.scales)
    return coded


def floats(matrix: Part) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else matrix.dequantize()


CODED = ["symmetric", "zeros", "minima"]


@pytest.mark.parametrize("columns", [slice(None), slice(0, 32), slice(32, 64), slice(64, 80)])
@pytest.mark.parametrize("name", CODED)
def test_a_cut_stands_for_that_part_of_the_whole(name: str, columns: slice) -> None:
    whole = part(name)
    assert isinstance(whole, GroupedWeight)
    assert torch.equal(cut(whole, slice(3, 9), columns).dequantize(), whole.dequantize()[3:9, columns])


@pytest.mark.parametrize("columns", [slice(16, 64), slice(0, 48), slice(48, 80)])
def test_a_cut_through_a_group_is_refused(columns: slice) -> None:
    whole = part("minima")
    assert isinstance(whole, GroupedWeight)
    with pytest.raises(ConfigError, match=f"columns {columns.start} to {columns.stop} of 80 .* whole groups of 32"):
        cut(whole, slice(None), columns)


@pytest.mark.parametrize("name", ["plain", *CODED])
def test_a_stack_stands_for_its_parts_in_order(name: str) -> None:
    parts = [part(name, rows) for rows in (5, 1, 7)]
    whole = stack(parts)
    assert num_rows(whole) == 13 and form(whole) == form(parts[0])
    assert torch.equal(floats(whole), torch.cat([floats(each) for each in parts]))


@pytest.mark.parametrize("name", ["plain", *CODED])
def test_zero_rows_come_below(name: str) -> None:
    whole = part(name)
    padded = floats(with_zero_rows(whole, 3))
    assert torch.equal(padded[:12], floats(whole)) and torch.equal(padded[12:], torch.zeros(3, COLUMNS))


def test_forms_differ_by_whatever_keeps_two_parts_from_being_one() -> None:
    coded = part("symmetric")
    assert isinstance(coded, GroupedWeight)
    others = [
        *map(part, ("plain", "zeros", "minima")),
        quantize_weight(coded.dequantize(), 8, 32),
        quantize_weight(coded.dequantize(), 4, 16),
        dataclasses.replace(coded, scales=coded.scales.half()),
    ]
    assert len({form(each) for each in (coded, *others)}) == 7


@pytest.mark.parametrize("kept", [slice(None), slice(4096, 5001), slice(5001, 5001)])
@pytest.mark.parametrize("name", ["plain", "minima"])
def test_float_rows_are_the_kept_ones_in_order(name: str, kept: slice) -> None:
    """More than one piece of them, or none: then one piece without rows."""
    whole = part(name, 5001)
    pieces = list(float_rows(whole, kept))
    expected = floats(whole)[kept]
    assert torch.equal(torch.cat([values for _, values in pieces]), expected)
    assert [row for rows, _ in pieces for row in range(rows.start, rows.stop)] == list(range(len(expected)))
