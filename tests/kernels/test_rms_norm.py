"""Owns the tests of rms_norm.
Does not know which backends exist (conftest.py)."""

import pytest
import torch
from servd_kernels.rms_norm import reference, rms_norm
from servd_kernels.strides import outer_inner
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


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("heads", [slice(0, 3), slice(3, 4), slice(4, 5)], ids=["q", "k", "v"])
def test_heads_of_a_fused_qkv_are_read_in_place(backend: str, heads: slice, tokens: int) -> None:
    view = torch.randn(tokens, 5 * 24).view(tokens, 5, 24)[:, heads]
    assert outer_inner(view)[0].data_ptr() == view.data_ptr()
    weight = torch.randn(24)
    out = rms_norm(view, weight, 1e-6, backend=backend)
    assert out.shape == view.shape
    assert_close(out, expected(view, weight, 1e-6), "norm", scale=3.0)


def test_x_and_residual_of_different_strides(backend: str) -> None:
    x, residual = torch.randn(3, 24, 5).transpose(1, 2), torch.randn(3, 5, 24)
    out, total = rms_norm(x, torch.ones(24), 1e-6, residual, backend=backend)
    assert torch.equal(total, x + residual)
    assert_close(out, expected(total, torch.ones(24), 1e-6), "norm")


@pytest.mark.parametrize("shape", [(24,), (2, 3, 2, 24)])
def test_other_ranks(backend: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(24)
    assert_close(rms_norm(x, weight, 1e-6, backend=backend), expected(x, weight, 1e-6), "norm")


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight .*\[5\]"):
        rms_norm(torch.ones(2, 4), torch.ones(5), 1e-5)
    with pytest.raises(ValueError, match=r"residual .*\[1, 4\]"):
        rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5, torch.ones(1, 4))
