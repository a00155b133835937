"""Owns the tests of silu_and_mul.
Does not know which backends exist (conftest.py), nor quantized output (test_activation.py)."""

import pytest
import torch
from servd_kernels.silu_and_mul import reference, silu_and_mul
from servd_kernels.testing import assert_close

from tests.kernels.conftest import VARIANTS


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


@pytest.mark.parametrize(
    ("backend", "dtype"),
    # Triton's interpreter loses subnormal numbers of bfloat16.
    [(name, torch.bfloat16) for name in VARIANTS if name != "triton"] + [(name, torch.float16) for name in VARIANTS],
    indirect=["backend"],
)
def test_subnormal_results_are_kept(backend: str, dtype: torch.dtype) -> None:
    """Every 16-bit rounding, also where a vector holds numbers of both kinds."""
    tiny = torch.finfo(dtype).tiny
    second = (torch.tensor([1.0, tiny, tiny / 8, -tiny / 4, 3.0]) * torch.ones(8, 1)).flatten().to(dtype)
    first = torch.full_like(second, 0.5)
    out = silu_and_mul(torch.cat([first, second]), backend=backend)
    exact = first.double() * torch.sigmoid(first.double()) * second.double()
    assert torch.equal(out, exact.to(dtype))
    assert bool(((out != 0) & (out.abs().float() < tiny)).any()), "some are subnormal"


def test_odd_last_dimension_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        silu_and_mul(torch.ones(2, 3))
