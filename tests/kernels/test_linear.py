"""Owns the tests of linear.
Does not know which backends exist (conftest.py)."""

import pytest
import torch
from servd_kernels import native
from servd_kernels.linear import linear, pack, reference
from servd_kernels.testing import assert_close

SHAPES = [
    (0, 5, 3),
    (1, 1, 1),
    (1, 49, 7),
    (3, 97, 66),
    (7, 48, 33),
    (9, 101, 576),
    (66, 50, 65),
    (130, 192, 100),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_matches_float64(
    backend: str, rows: int, columns: int, depth: int, with_bias: bool, dtype: torch.dtype
) -> None:
    inputs = reference.make_inputs(rows, columns, depth, with_bias, dtype)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    out = linear(x, pack(weight, backend), bias)
    assert out.shape == (rows, columns) and out.dtype == dtype
    assert_close(out, expected, "gemm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_float32_out_keeps_what_rounding_would_lose(backend: str, dtype: torch.dtype, with_bias: bool) -> None:
    inputs = reference.make_inputs(9, 101, 576, with_bias, dtype)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    out = linear(x, pack(weight, backend), bias, torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_another_out_dtype_is_refused() -> None:
    inputs = reference.make_inputs(1, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="out_dtype"):
        linear(inputs["x"], pack(inputs["weight"]), None, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_rows_with_nan_around(backend: str, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(5, 20, 33, dtype=dtype)
    wide = torch.full((5, 40), torch.nan, dtype=dtype)
    wide[:, 3:36] = inputs["x"]
    packed = pack(inputs["weight"], backend)
    assert torch.equal(linear(wide[:, 3:36], packed), linear(inputs["x"], packed))


def test_nan_stays_in_its_row(backend: str) -> None:
    inputs = reference.make_inputs(11, 20, 33)
    packed = pack(inputs["weight"], backend)
    clean = linear(inputs["x"], packed)
    inputs["x"][4, 32] = torch.nan
    spoiled = linear(inputs["x"], packed)
    assert spoiled[4].isnan().all()
    assert torch.equal(torch.cat([spoiled[:4], spoiled[5:]]), torch.cat([clean[:4], clean[5:]]))


def test_packed_weight_keeps_its_instruction_set() -> None:
    inputs = reference.make_inputs(3, 20, 33)
    packed = pack(inputs["weight"])
    before = linear(inputs["x"], packed)
    for isa in reversed(native.isas()):
        native.select_isa(isa)
        assert torch.equal(linear(inputs["x"], packed), before)


def test_wrong_shapes_are_named() -> None:
    packed = pack(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"x must be \[num_rows, 3\], not \[2, 4\]"):
        linear(torch.ones(2, 4), packed)
    with pytest.raises(ValueError, match=r"bias .*\[5\]"):
        linear(torch.ones(2, 3), packed, torch.ones(5))
    with pytest.raises(ValueError, match="bfloat16"):
        linear(torch.ones(2, 3, dtype=torch.bfloat16), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (49, 7), (101, 576)])
def test_rows_of_a_packed_weight_come_back_exactly(backend: str, columns: int, depth: int, dtype: torch.dtype) -> None:
    weight = reference.make_inputs(1, columns, depth, dtype=dtype)["weight"]
    ids = torch.randint(columns, (70,), generator=torch.Generator().manual_seed(0))
    rows = pack(weight, backend).rows
    assert torch.equal(rows(ids), weight[ids])
    assert torch.equal(rows(ids[::2]), weight[ids[::2]])
    assert rows(ids[:0]).shape == (0, depth)


@pytest.mark.parametrize("row", [-1, 5])
def test_rows_outside_the_weight_are_refused(backend: str, row: int) -> None:
    packed = pack(torch.ones(5, 3), backend)
    with pytest.raises(IndexError):
        packed.rows(torch.tensor([0, row]))
