"""Owns the tests of layer_norm.
Does not know which backends exist (conftest.py)."""

import pytest
import torch
from servd_kernels.layer_norm import layer_norm, reference
from servd_kernels.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    values = x.double()
    deviation = values - values.mean(-1, keepdim=True)
    out = deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 7), (5, 576), (37, 130), (64, 1000), (0, 8)])
def test_matches_float64(backend: str, rows: int, hidden: int, dtype: torch.dtype, bias: bool) -> None:
    inputs = reference.make_inputs(rows, hidden, dtype, bias)
    out = layer_norm(**inputs, backend=backend)
    assert out.shape == (rows, hidden)
    assert_close(out, expected(inputs["x"], inputs["weight"], inputs["bias"], inputs["eps"]), "norm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(3, 7), (33, 576)])
def test_residual_is_the_rounded_sum(backend: str, rows: int, hidden: int, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(rows, hidden, dtype, residual=True)
    out, total = layer_norm(**inputs, backend=backend)
    assert torch.equal(total, inputs["x"] + inputs["residual"])
    assert_close(out, expected(total, inputs["weight"], inputs["bias"], inputs["eps"]), "norm")


def test_a_large_mean_does_not_swamp_the_deviation(backend: str) -> None:
    x = 4096 + torch.randint(-8, 9, (5, 333)).float()  # exact, and so is their sum
    weight = torch.ones(333)
    out = layer_norm(x, weight, None, 1e-5, backend=backend)
    # The mean is rounded at 4096: its half a unit in the last place shifts every deviation.
    torch.testing.assert_close(out.double(), expected(x, weight, None, 1e-5), rtol=1e-4, atol=1e-4)


def test_heads_of_a_fused_projection(backend: str) -> None:
    heads = torch.randn(9, 5 * 24).view(9, 5, 24)[:, 1:4]
    weight, bias = torch.randn(24), torch.randn(24)
    out = layer_norm(heads, weight, bias, 1e-6, backend=backend)
    assert out.shape == (9, 3, 24)
    assert_close(out, expected(heads, weight, bias, 1e-6), "norm", scale=3.0)


def test_wrong_shapes_and_dtypes_are_named() -> None:
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight must be \[4\] .*\[5\]"):
        layer_norm(x, torch.ones(5), None, 1e-5)
    with pytest.raises(ValueError, match=r"bias must be \[4\] .*\[3\]"):
        layer_norm(x, weight, torch.ones(3), 1e-5)
    with pytest.raises(ValueError, match=r"residual .*\[1, 4\]"):
        layer_norm(x, weight, None, 1e-5, torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"bias must be torch.float32"):
        layer_norm(x, weight, weight.half(), 1e-5)
    with pytest.raises(ValueError, match="bias must have stride 1"):
        layer_norm(x, weight, torch.ones(8)[::2], 1e-5)
