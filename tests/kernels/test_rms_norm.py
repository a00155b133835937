"""Owns the tests of rms_norm.
Does not know which backends exist (conftest.py)."""

import pytest
import torch
from servd_kernels.rms_norm import reference, rms_norm
from servd_kernels.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    values = x.double()
    return values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 7), (5, 576), (37, 130), (64, 1000)])
def test_matches_float64(backend: str, rows: int, hidden: int, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(rows, hidden, dtype)
    out = rms_norm(**inputs, backend=backend)
    assert_close(out, expected(inputs["x"], inputs["weight"], inputs["eps"]), "norm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(3, 7), (33, 576)])
def test_residual_is_the_rounded_sum(backend: str, rows: int, hidden: int, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(rows, hidden, dtype, residual=True)
    out, total = rms_norm(**inputs, backend=backend)
    assert torch.equal(total, inputs["x"] + inputs["residual"])
    assert_close(out, expected(total, inputs["weight"], inputs["eps"]), "norm")


def test_heads_of_a_fused_qkv(backend: str) -> None:
    qkv = torch.randn(9, 5 * 24)
    heads = qkv.view(9, 5, 24)[:, 1:4]
    weight = torch.randn(24)
    out = rms_norm(heads, weight, 1e-6, backend=backend)
    assert out.shape == (9, 3, 24)
    assert_close(out, expected(heads, weight, 1e-6), "norm")


@pytest.mark.parametrize("shape", [(24,), (2, 3, 2, 24)])
def test_other_ranks(backend: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(24)
    assert_close(rms_norm(x, weight, 1e-6, backend=backend), expected(x, weight, 1e-6), "norm")


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight .*\[5\]"):
        rms_norm(torch.ones(2, 4), torch.ones(5), 1e-5)
    with pytest.raises(ValueError, match=r"residual .*\[1, 4\]"):
        rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5, torch.ones(1, 4))
