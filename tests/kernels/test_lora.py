"""Owns the tests of lora.
Does not know which backends exist (conftest.py)."""

from typing import Any

import pytest
import torch
from servd_kernels import native
from servd_kernels.lora import lora, reference
from servd_kernels.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # rows, adapters, max_rank, depth, slices
    (0, 2, 4, 5, (3,)),
    (1, 1, 1, 1, (1,)),
    (3, 2, 8, 33, (49,)),
    (23, 5, 21, 67, (33, 0, 20, 7)),
    (70, 2, 16, 130, (100, 64)),
    (5, 3, 33, 2100, (40,)),
]


def expected(inputs: dict[str, Any]) -> torch.Tensor:
    """In float64 throughout, a row at a time."""
    out: torch.Tensor = inputs["y"].double()
    for row, adapter in enumerate(inputs["adapter_ids"].tolist()):
        if adapter < 0:
            continue
        rank, begin = int(inputs["ranks"][adapter]), 0
        for a, width in zip(inputs["a"][adapter].double(), inputs["slices"], strict=True):
            b = inputs["b"][adapter, begin : begin + width, :rank].double()
            update = b @ (a[:rank] @ inputs["x"][row].double())
            out[row, begin : begin + width] += inputs["scalings"][adapter] * update
            begin += width
    return out


def updated(inputs: dict[str, Any], backend: str, rows: Any = slice(None)) -> torch.Tensor:
    y: torch.Tensor = inputs["y"][rows].clone()
    some = {"y": y, "x": inputs["x"][rows], "adapter_ids": inputs["adapter_ids"][rows]}
    lora(**{**inputs, **some}, backend=backend)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64_with_nan_beyond_each_rank(backend: str, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(*shape, dtype)
    y = updated(inputs, backend)
    assert y.isfinite().all()
    assert_close(y, expected(inputs), "gemm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_shrunk_keeps_float32(backend: str, dtype: torch.dtype) -> None:
    """Two ranks that nearly cancel: rounded between the two products, nothing right would be left."""
    depth = 64
    a = torch.ones(1, 2, depth, dtype=dtype)
    a[0, 1] = -1
    a[0, 0, 0] = 1.0078125 if dtype == torch.bfloat16 else 1.0009765625
    x = torch.full((1, depth), 1.0, dtype=dtype)
    y = torch.zeros(1, 8, dtype=dtype)
    lora(y, x, torch.zeros(1, dtype=torch.int32), a, torch.ones(1, 8, 2, dtype=dtype),
         torch.tensor([2], dtype=torch.int32), torch.ones(1), backend=backend)  # fmt: skip
    assert torch.equal(y, (a[0, 0, 0] - 1).expand(1, 8))


def test_rows_without_an_adapter_and_rank_zero_stay(backend: str) -> None:
    inputs = reference.make_inputs(9, 3, 8, 40, (30,))
    inputs["adapter_ids"] = torch.tensor([-1, 0, 3, -7, 1, 1, 2, 0, -1], dtype=torch.int32)
    inputs["ranks"][1] = 0
    inputs["a"][1], inputs["b"][1] = torch.nan, torch.nan
    inputs["y"][4] = -0.0
    y = updated(inputs, backend)
    kept = [0, 2, 3, 4, 5, 8]
    assert torch.equal(y[kept].view(torch.int32), inputs["y"][kept].view(torch.int32))
    assert not torch.equal(y[1], inputs["y"][1])


def test_strided_rows_with_nan_around(backend: str) -> None:
    inputs = reference.make_inputs(7, 2, 8, 33, (20, 13))
    y = updated(inputs, backend)
    wide_x, wide_y = torch.full((2, 7, 40), torch.nan)
    wide_x[:, 3:36], wide_y[:, 2:35] = inputs["x"], inputs["y"]
    lora(**{**inputs, "x": wide_x[:, 3:36], "y": wide_y[:, 2:35]}, backend=backend)
    assert torch.equal(wide_y[:, 2:35], y)
    assert wide_y[:, :2].isnan().all() and wide_y[:, 35:].isnan().all()


def test_three_dimensions_are_one_projection(backend: str) -> None:
    inputs = reference.make_inputs(4, 2, 8, 33, (20,))
    y = inputs["y"].clone()
    lora(**{**inputs, "y": y, "a": inputs["a"][:, 0], "slices": None}, backend=backend)
    assert torch.equal(y, updated(inputs, backend))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_the_others(backend: str, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(64, 2, 17, 150, (35, 40), dtype)
    whole = updated(inputs, backend)
    for size in (7, 33):
        parts = [updated(inputs, backend, slice(at, at + size)) for at in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)
    for row in (0, 5, 63):
        assert torch.equal(updated(inputs, backend, slice(row, row + 1))[0], whole[row])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(updated(inputs, backend, order), whole[order])
    many = order.repeat(3)
    assert torch.equal(updated(inputs, backend, many), whole[many])


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(70, 5, 24, 300, (200, 150), dtype)
    results = []
    for threads in (1, 2, 5):
        native.set_num_threads(threads)
        results.append(updated(inputs, "cpu"))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_wrong_shapes_and_dtypes_are_named() -> None:
    inputs = reference.make_inputs(4, 2, 8, 33, (20,))
    with pytest.raises(ValueError, match=r"slices must be widths that sum to N = 20, not \[20, 1\]"):
        lora(**{**inputs, "slices": (20, 1)})
    with pytest.raises(ValueError, match=r"a must be \[num_adapters, 2, max_rank, 33\], not \[2, 1, 8, 33\]"):
        lora(**{**inputs, "slices": (12, 8)})
    with pytest.raises(ValueError, match=r"b must be \[2, 20, 8\]"):
        lora(**{**inputs, "b": inputs["b"][:, :19]})
    with pytest.raises(ValueError, match=r"adapter_ids must be torch.int32 \[4\], not torch.int64"):
        lora(**{**inputs, "adapter_ids": inputs["adapter_ids"].long()})
    with pytest.raises(ValueError, match="b must be torch.float32 like y, not torch.bfloat16"):
        lora(**{**inputs, "b": inputs["b"].bfloat16()})
    with pytest.raises(ValueError, match="b must be contiguous"):
        lora(**{**inputs, "b": inputs["b"].transpose(1, 2).contiguous().transpose(1, 2)})
