"""Owns the tests of the vendor's linear: where it may serve, and what it gives.
Does not know the order of its sums."""

import pytest
import torch
from servd_kernels.linear import OP, library, linear, pack, reference
from servd_kernels.testing import assert_close


def test_it_is_refused_unless_bits_may_depend_on_the_batch() -> None:
    with pytest.raises(ValueError, match="its sums depend on the batch"):
        OP.bind("cpu", torch.float32, "library")
    with pytest.raises(ValueError, match="its sums depend on the batch"):
        pack(torch.ones(4, 3), "library")
    assert pack(torch.ones(4, 3), "library", deterministic=False).run is library.run


def test_it_comes_before_our_own_on_a_gpu() -> None:
    names = OP.backends()
    assert names.index("library") < names.index("triton")
    assert OP.reason_against("library", "cuda", torch.bfloat16, deterministic=False) is None


def test_it_keeps_the_weight_as_it_is() -> None:
    weight = torch.randn(6, 3)
    packed = pack(weight, "library", deterministic=False)
    assert packed.data.data_ptr() == weight.data_ptr()
    assert torch.equal(packed.rows(torch.tensor([4, 0])), weight[[4, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_matches_float64(dtype: torch.dtype, gated: bool, activation: str | None, with_residual: bool) -> None:
    inputs = reference.make_inputs(9, 50, 130, True, dtype)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    residual = torch.randn(9, 25 if gated else 50).to(dtype) if with_residual else None
    product = x.double() @ weight.double().T + bias.double()
    expected = reference.follow(product, gated, activation) + (0.0 if residual is None else residual.double())
    packed = pack(weight, "library", gated, deterministic=False)
    for out_dtype in (dtype, torch.float32):
        out = linear(x, packed, bias, out_dtype, activation, residual)
        assert out.dtype == out_dtype
        assert_close(out, expected, "gemm", 2.0)
