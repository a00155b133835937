"""Owns the tests of gelu and gelu_and_mul.
Does not know which backends exist (conftest.py), nor quantized output (test_activation.py)."""

import math

import pytest
import torch
from servd_kernels.gelu import gelu, reference
from servd_kernels.gelu_and_mul import gelu_and_mul
from servd_kernels.gelu_and_mul import reference as gated_reference
from servd_kernels.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (5, 1536), (33, 1030), (0, 8)]
FORMS = ["none", "tanh"]


def expected(x: torch.Tensor, approximate: str) -> torch.Tensor:
    x = x.double()
    if approximate == "none":
        return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_matches_float64(backend: str, rows: int, width: int, dtype: torch.dtype, approximate: str) -> None:
    x = reference.make_inputs(rows, width, dtype)["x"]
    out = gelu(x, approximate, backend=backend)
    assert out.shape == (rows, width)
    assert_close(out, expected(x, approximate), "elementwise")


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_gated_matches_float64(backend: str, rows: int, width: int, dtype: torch.dtype, approximate: str) -> None:
    x = gated_reference.make_inputs(rows, width, dtype)["x"]
    out = gelu_and_mul(x, approximate, backend=backend)
    first, second = x.double().chunk(2, -1)
    assert out.shape == (rows, width)
    assert_close(out, expected(first, approximate) * second, "elementwise", scale=3.0)


@pytest.mark.parametrize("approximate", FORMS)
def test_extremes(backend: str, approximate: str) -> None:
    x = torch.tensor([-1e4, -100.0, -10.0, -5.0, -0.0, 0.0, 1e-30, 5.0, 10.0, 100.0, 1e4, torch.inf, torch.nan])
    assert_close(gelu(x, approximate, backend=backend), expected(x, approximate), "elementwise")


def test_normal_distribution_everywhere(backend: str) -> None:
    """The native kernel's own approximation, densely, and relative to the value where that is far from 0."""
    x = torch.linspace(-8, 8, 20_011)
    out = gelu(x, backend=backend)
    assert_close(out, expected(x, "none"), "elementwise")
    near = x.abs() < 4
    relative = (out.double() - expected(x, "none")).abs() / expected(x, "none").abs().clamp(min=1e-30)
    limit = 5e-6 if backend == "cpu" else 2e-2  # 1 + erf cancels in float32
    assert relative[near].max() < limit


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="approximate is 'erf'; allowed: none, tanh"):
        gelu(torch.ones(2), "erf")
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        gelu_and_mul(torch.ones(2, 3))
