"""Owns the tests of linear_fp8.
Does not know which backends exist (conftest.py)."""

import pytest
import torch
from servd_kernels import native
from servd_kernels.linear_fp8 import linear_fp8, pack, quantize_weight, reference
from servd_kernels.testing import assert_close
from servd_kernels.weight_quant import FP8, quantize_fp8
from torch.nn import functional

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 5, 3), (1, 1, 1), (1, 49, 7), (3, 97, 66), (7, 48, 36), (9, 101, 576), (66, 50, 65), (130, 192, 300)]
ACTIVATIONS = ["none", "fp8"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_is_exact_in_the_decoded_weight(
    backend: str, rows: int, columns: int, depth: int, with_bias: bool, dtype: torch.dtype
) -> None:
    inputs = reference.make_inputs(rows, columns, depth, with_bias, dtype)
    x, codes, scales, bias = inputs["x"], inputs["codes"], inputs["scales"], inputs["bias"]
    expected = x.double() @ (codes.double() * scales.double().unsqueeze(1)).T
    if bias is not None:
        expected += bias.double()
    packed = pack(codes, scales, backend=backend)
    out = linear_fp8(x, packed, bias)
    assert out.shape == (rows, columns) and out.dtype == dtype
    assert_close(out, expected, "gemm")
    wide = linear_fp8(x, packed, bias, torch.float32)
    torch.testing.assert_close(wide.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_rounded_activations_match_the_reference(
    backend: str, rows: int, columns: int, depth: int, dtype: torch.dtype
) -> None:
    inputs = reference.make_inputs(rows, columns, depth, True, dtype)
    x, codes, scales, bias = inputs["x"], inputs["codes"], inputs["scales"], inputs["bias"]
    expected = linear_fp8(x, pack(codes, scales, "fp8", "reference"), bias, torch.float32)
    packed = pack(codes, scales, "fp8", backend)
    torch.testing.assert_close(linear_fp8(x, packed, bias, torch.float32), expected, rtol=1e-5, atol=1e-5)


def test_codes_given_are_as_good_as_codes_made_here(backend: str) -> None:
    inputs = reference.make_inputs(9, 101, 579, dtype=torch.bfloat16)
    packed = pack(inputs["codes"], inputs["scales"], "fp8", backend)
    x_codes, x_scales = quantize_fp8(inputs["x"])
    out = linear_fp8(x_codes, packed, None, torch.bfloat16, x_scales)
    assert torch.equal(out, linear_fp8(inputs["x"], packed))
    assert linear_fp8(x_codes, packed, None, None, x_scales).dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_decoded_exactly(backend: str, dtype: torch.dtype, rows: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).unsqueeze(1)
    x = torch.ones(rows, 1, dtype=dtype)
    out = linear_fp8(x, pack(codes, torch.ones(256), backend=backend), None, torch.float32)
    expected = codes.float().T.expand(rows, 256)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_rounding_of_activations_is_to_nearest_even(backend: str) -> None:
    # 448 first: the scale is 1. Then a dense sweep, ties and subnormals among it.
    x = torch.cat([torch.tensor([448.0]), torch.arange(-255, 256) / 2048, torch.arange(-448, 449) / 2, torch.zeros(3)])
    packed = pack(torch.eye(len(x)).to(FP8), torch.ones(len(x)), "fp8", backend)
    out = linear_fp8(x.unsqueeze(0), packed)
    assert torch.equal(out[0], x.to(FP8).float())


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_row_alone(backend: str, activations: str, value: float) -> None:
    inputs = reference.make_inputs(11, 20, 300)
    packed = pack(inputs["codes"], inputs["scales"], activations, backend)
    clean = linear_fp8(inputs["x"], packed)
    inputs["x"][4, 299] = value
    spoiled = linear_fp8(inputs["x"], packed)
    assert not spoiled[4].isfinite().any()
    assert torch.equal(torch.cat([spoiled[:4], spoiled[5:]]), torch.cat([clean[:4], clean[5:]]))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_with_nan_around(backend: str, activations: str, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(5, 20, 40, dtype=dtype)
    wide = torch.full((5, 50), torch.nan, dtype=dtype)
    wide[:, 3:43] = inputs["x"]
    packed = pack(inputs["codes"], inputs["scales"], activations, backend)
    assert torch.equal(linear_fp8(wide[:, 3:43], packed), linear_fp8(inputs["x"], packed))
    assert torch.equal(linear_fp8(inputs["x"].T.contiguous().T, packed), linear_fp8(inputs["x"], packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_row_alone_in_a_few_and_elsewhere(backend: str, activations: str, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(70, 101, 578, dtype=dtype)
    x, packed = inputs["x"], pack(inputs["codes"], inputs["scales"], activations, backend)
    whole = linear_fp8(x, packed)
    for size in (9, 33) if backend == "triton" else (1, 3, 7, 9, 33):
        assert torch.equal(torch.cat([linear_fp8(part, packed) for part in x.split(size)]), whole)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear_fp8(x[order], packed), whole[order])


@pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in native.isas()], indirect=True)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_threads_change_nothing(backend: str, restore_threads: None, activations: str) -> None:
    inputs = reference.make_inputs(70, 101, 578, dtype=torch.bfloat16)
    packed = pack(inputs["codes"], inputs["scales"], activations, backend)
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        results.append(linear_fp8(inputs["x"], packed))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activation_follows_the_bias(backend: str, activation: str) -> None:
    inputs = reference.make_inputs(9, 50, 100, True)
    packed = pack(inputs["codes"], inputs["scales"], backend=backend)
    plain = linear_fp8(inputs["x"], packed, inputs["bias"])
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    expected = functional.silu(plain) if activation == "silu" else functional.gelu(plain, approximate=approximate)
    out = linear_fp8(inputs["x"], packed, inputs["bias"], None, None, activation)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="activation is 'relu'; allowed: None, silu, gelu, gelu_tanh"):
        linear_fp8(inputs["x"], packed, inputs["bias"], None, None, "relu")


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(0, 5, 16), (3, 50, 66), (70, 97, 130)])
def test_gate_and_residual(backend: str, rows: int, columns: int, depth: int, activations: str) -> None:
    inputs = reference.make_inputs(rows, 2 * columns, depth, True, torch.bfloat16)
    x, codes, scales, bias = inputs["x"], inputs["codes"], inputs["scales"], inputs["bias"]
    residual = torch.randn(rows, columns + 5, generator=torch.Generator().manual_seed(1))[:, 2:-3]
    gate, up = linear_fp8(x, pack(codes, scales, activations), bias, torch.float32).chunk(2, 1)
    packed = pack(codes, scales, activations, backend, gated=True)
    out = linear_fp8(x, packed, bias, torch.float32, None, "silu", residual)
    assert packed.out_features == columns and out.shape == (rows, columns)
    torch.testing.assert_close(out, functional.silu(gate) * up + residual, rtol=2e-5, atol=2e-5)


def test_error_of_the_quantizer() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_weight(weight)
    error = codes.float() * scales.unsqueeze(1) - weight
    bound = (weight.abs() / 16).maximum(scales.unsqueeze(1) * 2**-10)  # half a unit of 3 bits, or of a subnormal
    assert error.abs().le(bound * 1.001).all()
    assert float(error.norm() / weight.norm()) < 0.03


def test_what_does_not_fit_is_named() -> None:
    codes, scales = torch.ones(4, 3).to(FP8), torch.ones(4)
    packed = pack(codes, scales)
    with pytest.raises(ValueError, match=r"x must be \[num_rows, 3\], not \[2, 4\]"):
        linear_fp8(torch.ones(2, 4), packed)
    with pytest.raises(ValueError, match=r"x is torch.float8_e4m3fn; allowed: .*bfloat16"):
        linear_fp8(torch.ones(2, 3).to(FP8), packed)
    with pytest.raises(ValueError, match="x_scales must be given where x is torch.float8_e4m3fn"):
        linear_fp8(torch.ones(2, 3).to(FP8), pack(codes, scales, "fp8"))
    with pytest.raises(ValueError, match=r"x_scales must be torch.float32 \[2\]"):
        linear_fp8(torch.ones(2, 3).to(FP8), pack(codes, scales, "fp8"), None, None, torch.ones(3))
    with pytest.raises(ValueError, match=r"bias .*\[5\]"):
        linear_fp8(torch.ones(2, 3), packed, torch.ones(5))
    with pytest.raises(ValueError, match="out_dtype is torch.int8"):
        linear_fp8(torch.ones(2, 3), packed, None, torch.int8)
    with pytest.raises(ValueError, match="activations is 'int8'; allowed: none, fp8"):
        pack(codes, scales, "int8")
    with pytest.raises(ValueError, match=r"codes must be torch.float8_e4m3fn"):
        pack(codes.float(), scales)
    with pytest.raises(ValueError, match=r"scales must be torch.float32 \[4\]"):
        pack(codes, torch.ones(5))
