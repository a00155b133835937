"""Owns the tests of silu_and_mul.
Does not know which backends exist (conftest.py), nor quantized output (test_activation.py)."""

import pytest
import torch
from servd_kernels.silu_and_mul import reference, silu_and_mul
from servd_kernels.testing import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 1536), (33, 1030), (0, 8)])
def test_matches_float64(backend: str, rows: int, width: int, dtype: torch.dtype) -> None:
    x = reference.make_inputs(rows, width, dtype)["x"]
    first, second = x.double().chunk(2, -1)
    out = silu_and_mul(x, backend=backend)
    assert out.shape == (rows, width)
    assert_close(out, first * torch.sigmoid(first) * second, "elementwise")


def test_extremes(backend: str) -> None:
    first = torch.tensor([-1e4, -100.0, -88.0, -0.0, 0.0, 88.0, 100.0, 1e4, torch.nan])
    out = silu_and_mul(torch.cat([first, torch.ones(9)]), backend=backend)
    assert_close(out, first.double() * torch.sigmoid(first.double()), "elementwise")


def test_odd_last_dimension_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        silu_and_mul(torch.ones(2, 3))
