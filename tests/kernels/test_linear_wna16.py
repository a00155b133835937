"""Owns the tests of linear_wna16.
Does not know which backends exist (conftest.py)."""

import dataclasses
import itertools

import pytest
import torch
from servd_kernels import native
from servd_kernels.linear_wna16 import GroupedWeight, linear_wna16, pack, quantize_weight, reference
from servd_kernels.testing import assert_close
from torch.nn import functional

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 5, 3), (1, 1, 1), (1, 49, 7), (3, 97, 66), (6, 48, 36), (9, 101, 576), (66, 50, 65), (130, 96, 300)]
FORMS = list(itertools.product([4, 8], [16, 32, 128, None], ["symmetric", "zeros", "minima"]))
ACTIVATIONS = ["none", "int8"]


def weight_of(inputs: dict[str, object], form: str) -> GroupedWeight:
    """The weight of make_inputs, its zero points written as minima where that is the form."""
    weight = inputs["weight"]
    assert isinstance(weight, GroupedWeight)
    if form != "minima":
        return weight
    assert weight.zeros is not None
    minima = (-weight.zeros.float() * weight.scales.float()).half()
    return dataclasses.replace(weight, zeros=None, minima=minima)


@pytest.mark.parametrize(("bits", "group", "form"), FORMS)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_is_exact_in_the_dequantized_weight(
    backend: str, rows: int, columns: int, depth: int, bits: int, group: int | None, form: str
) -> None:
    for dtype in DTYPES:
        inputs = reference.make_inputs(rows, columns, depth, bits, group or depth, form == "symmetric", dtype)
        x, weight, bias = inputs["x"], weight_of(inputs, form), inputs["bias"]
        expected = x.double() @ weight.dequantize().double().T + bias.double()
        out = linear_wna16(x, pack(weight, backend=backend), bias)
        assert out.shape == (rows, columns) and out.dtype == dtype
        assert_close(out, expected, "gemm")
        wide = linear_wna16(x, pack(weight, backend=backend), bias, torch.float32)
        torch.testing.assert_close(wide.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "group", "form"), FORMS)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_integer_activations_match_the_reference(
    backend: str, rows: int, columns: int, depth: int, bits: int, group: int | None, form: str
) -> None:
    inputs = reference.make_inputs(rows, columns, depth, bits, group or depth, form == "symmetric", torch.bfloat16)
    weight = weight_of(inputs, form)
    if backend == "triton" and group == 16 and depth > 16:
        with pytest.raises(ValueError, match="groups of 16 are fewer columns than a GPU's int8 products take"):
            pack(weight, "int8", backend)
        return
    expected = linear_wna16(inputs["x"], pack(weight, "int8", "reference"), inputs["bias"], torch.float32)
    out = linear_wna16(inputs["x"], pack(weight, "int8", backend), inputs["bias"], torch.float32)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_scales_of_every_dtype(backend: str, scale_dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(5, 50, 130)
    weight = dataclasses.replace(inputs["weight"], scales=inputs["weight"].scales.to(scale_dtype))
    expected = inputs["x"].double() @ weight.dequantize().double().T
    assert_close(linear_wna16(inputs["x"], pack(weight, backend=backend)), expected, "gemm")


@pytest.mark.parametrize("group", [512, 1000])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_groups_longer_than_a_segment(backend: str, group: int, activations: str) -> None:
    inputs = reference.make_inputs(9, 50, 1000, 4, group, False)
    expected = linear_wna16(inputs["x"], pack(inputs["weight"], activations, "reference"))
    assert_close(linear_wna16(inputs["x"], pack(inputs["weight"], activations, backend)), expected, "gemm")


@pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in native.isas()], indirect=True)
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, False), (8, 32, True), (8, 16, True)])
def test_more_groups_than_one_walk_down_a_panel(backend: str, bits: int, group: int, symmetric: bool) -> None:
    inputs = reference.make_inputs(9, 50, 2212, bits, group, symmetric, torch.bfloat16)
    expected = linear_wna16(inputs["x"], pack(inputs["weight"], "int8", "reference"), None, torch.float32)
    packed = pack(inputs["weight"], "int8", backend)
    out = linear_wna16(inputs["x"], packed, None, torch.float32)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(linear_wna16(inputs["x"][4:5], packed, None, torch.float32), out[4:5])


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(("bits", "form"), [(4, "minima"), (4, "zeros"), (8, "symmetric")])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(0, 5, 16), (3, 50, 66), (70, 97, 130)])
def test_gate_and_residual(
    backend: str, rows: int, columns: int, depth: int, bits: int, form: str, activations: str
) -> None:
    inputs = reference.make_inputs(rows, 2 * columns, depth, bits, 32, form == "symmetric", torch.bfloat16)
    x, weight, bias = inputs["x"], weight_of(inputs, form), inputs["bias"]
    residual = torch.randn(rows, columns + 5, generator=torch.Generator().manual_seed(1))[:, 2:-3]
    gate, up = linear_wna16(x, pack(weight, activations), bias, torch.float32).chunk(2, 1)
    packed = pack(weight, activations, backend, gated=True)
    out = linear_wna16(x, packed, bias, torch.float32, "silu", residual)
    assert packed.out_features == columns and out.shape == (rows, columns)
    torch.testing.assert_close(out, functional.silu(gate) * up + residual, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_row_alone(backend: str, activations: str, value: float) -> None:
    inputs = reference.make_inputs(11, 20, 300)
    packed = pack(inputs["weight"], activations, backend)
    clean = linear_wna16(inputs["x"], packed)
    inputs["x"][4, 299] = value
    spoiled = linear_wna16(inputs["x"], packed)
    assert not spoiled[4].isfinite().any()
    assert torch.equal(torch.cat([spoiled[:4], spoiled[5:]]), torch.cat([clean[:4], clean[5:]]))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_with_nan_around(backend: str, activations: str, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(5, 20, 40, dtype=dtype)
    wide = torch.full((5, 50), torch.nan, dtype=dtype)
    wide[:, 3:43] = inputs["x"]
    packed = pack(inputs["weight"], activations, backend)
    assert torch.equal(linear_wna16(wide[:, 3:43], packed), linear_wna16(inputs["x"], packed))
    assert torch.equal(linear_wna16(inputs["x"].T.contiguous().T, packed), linear_wna16(inputs["x"], packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_row_alone_in_a_few_and_elsewhere(
    backend: str, symmetric: bool, bits: int, activations: str, dtype: torch.dtype
) -> None:
    inputs = reference.make_inputs(70, 101, 580, bits, 64, symmetric, dtype)
    x, packed = inputs["x"], pack(inputs["weight"], activations, backend)
    whole = linear_wna16(x, packed)
    for size in (9, 33) if backend == "triton" else (1, 3, 7, 9, 33):
        assert torch.equal(torch.cat([linear_wna16(part, packed) for part in x.split(size)]), whole)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear_wna16(x[order], packed), whole[order])


@pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in native.isas()], indirect=True)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_threads_change_nothing(backend: str, restore_threads: None, activations: str) -> None:
    inputs = reference.make_inputs(70, 101, 580, 4, 64, False, torch.bfloat16)
    packed = pack(inputs["weight"], activations, backend)
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        results.append(linear_wna16(inputs["x"], packed))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activation_follows_the_bias(backend: str, activation: str) -> None:
    inputs = reference.make_inputs(9, 50, 100)
    packed = pack(inputs["weight"], backend=backend)
    plain = linear_wna16(inputs["x"], packed, inputs["bias"])
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    expected = functional.silu(plain) if activation == "silu" else functional.gelu(plain, approximate=approximate)
    out = linear_wna16(inputs["x"], packed, inputs["bias"], None, activation)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="activation is 'relu'; allowed: None, silu, gelu, gelu_tanh"):
        linear_wna16(inputs["x"], packed, inputs["bias"], None, "relu")


def test_packed_weight_keeps_its_instruction_set() -> None:
    inputs = reference.make_inputs(3, 20, 33)
    packed = pack(inputs["weight"])
    before = linear_wna16(inputs["x"], packed)
    for isa in reversed(native.isas()):
        native.select_isa(isa)
        assert torch.equal(linear_wna16(inputs["x"], packed), before)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "limit"), [(4, 0.12), (8, 0.008)])
def test_error_of_the_quantizer(bits: int, limit: float, symmetric: bool) -> None:
    weight = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    errors = []
    for group in (None, 128, 32):
        quantized = quantize_weight(weight, bits, group, symmetric)
        error = quantized.dequantize() - weight
        spread = quantized.scales.abs().repeat_interleave(group or 1000, 1)[:, :1000]
        assert error.abs().le(spread * 1.001).all()  # half a step; a whole one where the last code is cut
        errors.append(float(error.norm() / weight.norm()))
    assert errors[0] > errors[1] > errors[2] and errors[1] < limit


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_quantizer_keeps_zero_and_constant_groups(symmetric: bool) -> None:
    weight = torch.zeros(3, 64)
    weight[1], weight[2] = 3.0, -2.0
    back = quantize_weight(weight, 4, 32, symmetric).dequantize()
    torch.testing.assert_close(back, weight)


def test_what_does_not_fit_is_named() -> None:
    codes, scales = torch.ones(4, 64, dtype=torch.uint8), torch.ones(4, 2)
    weight = GroupedWeight(codes, scales, 4, 32)
    packed = pack(weight)
    for changes, message in (
        ({"bits": 3}, "bits is 3; allowed: 4, 8"),
        ({"group_size": 0}, "group_size is 0"),
        ({"codes": codes * 16}, r"codes hold 16; allowed: 0..15"),
        ({"codes": codes.int()}, "codes must be torch.uint8"),
        ({"scales": scales[:, :1]}, r"scales must be torch.float32 \[4, 2\], not torch.float32 \[4, 1\]"),
        ({"scales": scales.double()}, "scales are torch.float64"),
        ({"zeros": scales}, r"zeros must be torch.uint8 \[4, 2\]"),
        ({"zeros": codes[:, :2], "minima": scales}, "zeros and minima are both given"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(weight, **changes)
    with pytest.raises(ValueError, match="activations is 'fp8'; allowed: none, int8"):
        pack(weight, "fp8")
    with pytest.raises(ValueError, match=r"x must be \[num_rows, 64\], not \[2, 4\]"):
        linear_wna16(torch.ones(2, 4), packed)
    with pytest.raises(ValueError, match="x is torch.int8"):
        linear_wna16(torch.ones(2, 64, dtype=torch.int8), packed)
    with pytest.raises(ValueError, match="out_dtype is torch.int8"):
        linear_wna16(torch.ones(2, 64), packed, None, torch.int8)
    with pytest.raises(ValueError, match=r"bias .*\[5\]"):
        linear_wna16(torch.ones(2, 64), packed, torch.ones(5))
    with pytest.raises(ValueError, match="group_size must be 16, 32, 64, 128, a multiple of 256 or .*, not 48"):
        pack(GroupedWeight(codes, scales, 4, 48), backend="cpu")
