"""Owns the tests of linear_w8a8.
Does not know which backends exist (conftest.py)."""

import pytest
import torch
from servd_kernels import native
from servd_kernels.linear_w8a8 import linear_w8a8, pack, quantize_weight, reference
from servd_kernels.testing import assert_close
from servd_kernels.weight_quant import quantize_int8, rotate
from torch.nn import functional

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 5, 3), (1, 1, 1), (1, 49, 7), (3, 97, 66), (7, 48, 36), (9, 101, 576), (66, 50, 65), (130, 192, 100)]
GROUPS = [None, 32, 64, 256]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_whole_rows_equal_the_reference_to_the_bit(
    backend: str, rows: int, columns: int, depth: int, dtype: torch.dtype
) -> None:
    inputs = reference.make_inputs(rows, columns, depth, True, dtype)
    x, codes, scales, bias = inputs["x"], inputs["codes"], inputs["scales"], inputs["bias"]
    expected = linear_w8a8(x, pack(codes, scales, None, "reference"), bias)
    out = linear_w8a8(x, pack(codes, scales, None, backend), bias)
    assert out.shape == (rows, columns) and out.dtype == dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_groups_match_the_reference(
    backend: str, rows: int, columns: int, depth: int, group: int, with_bias: bool
) -> None:
    inputs = reference.make_inputs(rows, columns, depth, with_bias)
    x, codes, scales, bias = inputs["x"], inputs["codes"], inputs["scales"], inputs["bias"]
    expected = linear_w8a8(x, pack(codes, scales, group, "reference"), bias)
    assert_close(linear_w8a8(x, pack(codes, scales, group, backend), bias), expected, "gemm")


@pytest.mark.parametrize("group", GROUPS)
def test_codes_given_are_as_good_as_codes_made_here(backend: str, group: int | None) -> None:
    inputs = reference.make_inputs(9, 101, 579, dtype=torch.bfloat16)
    packed = pack(inputs["codes"], inputs["scales"], group, backend)
    x_codes, x_scales = quantize_int8(inputs["x"], group)
    out = linear_w8a8(x_codes, packed, None, torch.bfloat16, x_scales)
    assert torch.equal(out, linear_w8a8(inputs["x"], packed))
    assert linear_w8a8(x_codes, packed, None, None, x_scales).dtype == torch.float32


def test_a_row_longer_than_one_walk_is_exact(backend: str) -> None:
    inputs = reference.make_inputs(10, 50, 9001)
    codes, scales = inputs["codes"], inputs["scales"]
    expected = linear_w8a8(inputs["x"], pack(codes, scales, None, "reference"))
    assert torch.equal(linear_w8a8(inputs["x"], pack(codes, scales, None, backend)), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])  # a Triton grid begins at one column
def test_no_columns_give_the_bias(backend: str) -> None:
    packed = pack(torch.zeros(5, 0, dtype=torch.int8), torch.ones(5), None, backend)
    assert linear_w8a8(torch.ones(3, 0), packed, torch.arange(5.0)).equal(torch.arange(5.0).expand(3, 5))


def test_extreme_codes_do_not_saturate(backend: str) -> None:
    codes = torch.full((50, 130), 127, dtype=torch.int8)
    codes[1::2] = -127
    x = torch.full((3, 130), 127, dtype=torch.int8)
    out = linear_w8a8(x, pack(codes, torch.ones(50), None, backend), None, None, torch.ones(3))
    assert out[:, ::2].eq(127 * 127 * 130).all() and out[:, 1::2].eq(-127 * 127 * 130).all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_row_alone(backend: str, group: int | None, value: float) -> None:
    inputs = reference.make_inputs(11, 20, 300)
    packed = pack(inputs["codes"], inputs["scales"], group, backend)
    clean = linear_w8a8(inputs["x"], packed)
    inputs["x"][4, 299] = value
    spoiled = linear_w8a8(inputs["x"], packed)
    assert spoiled[4].isnan().all()
    assert torch.equal(torch.cat([spoiled[:4], spoiled[5:]]), torch.cat([clean[:4], clean[5:]]))


def test_a_row_of_zeros_gives_the_bias(backend: str) -> None:
    inputs = reference.make_inputs(2, 20, 64, bias=True)
    inputs["x"][1] = 0
    out = linear_w8a8(inputs["x"], pack(inputs["codes"], inputs["scales"], None, backend), inputs["bias"])
    assert torch.equal(out[1], inputs["bias"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_with_nan_around(backend: str, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(5, 20, 33, dtype=dtype)
    wide = torch.full((5, 40), torch.nan, dtype=dtype)
    wide[:, 3:36] = inputs["x"]
    packed = pack(inputs["codes"], inputs["scales"], None, backend)
    assert torch.equal(linear_w8a8(wide[:, 3:36], packed), linear_w8a8(inputs["x"], packed))
    assert torch.equal(linear_w8a8(inputs["x"].T.contiguous().T, packed), linear_w8a8(inputs["x"], packed))


@pytest.mark.parametrize("group", GROUPS)
def test_a_row_alone_in_a_few_and_elsewhere(backend: str, group: int | None) -> None:
    inputs = reference.make_inputs(70, 101, 578, dtype=torch.bfloat16)
    x, packed = inputs["x"], pack(inputs["codes"], inputs["scales"], group, backend)
    whole = linear_w8a8(x, packed)
    for size in (9, 33) if backend == "triton" else (1, 7, 9, 33):
        assert torch.equal(torch.cat([linear_w8a8(part, packed) for part in x.split(size)]), whole)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear_w8a8(x[order], packed), whole[order])


@pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in native.isas()], indirect=True)
@pytest.mark.parametrize("group", GROUPS)
def test_threads_change_nothing(backend: str, restore_threads: None, group: int | None) -> None:
    inputs = reference.make_inputs(70, 101, 578)
    packed = pack(inputs["codes"], inputs["scales"], group, backend)
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        results.append(linear_w8a8(inputs["x"], packed))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activation_follows_the_bias(backend: str, activation: str) -> None:
    inputs = reference.make_inputs(9, 50, 100, True)
    packed = pack(inputs["codes"], inputs["scales"], backend=backend)
    plain = linear_w8a8(inputs["x"], packed, inputs["bias"])
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    expected = functional.silu(plain) if activation == "silu" else functional.gelu(plain, approximate=approximate)
    out = linear_w8a8(inputs["x"], packed, inputs["bias"], None, None, activation)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="activation is 'relu'; allowed: None, silu, gelu, gelu_tanh"):
        linear_w8a8(inputs["x"], packed, inputs["bias"], None, None, "relu")


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(0, 5, 16), (3, 50, 66), (70, 97, 130)])
def test_gate_and_residual(backend: str, rows: int, columns: int, depth: int, group: int | None) -> None:
    inputs = reference.make_inputs(rows, 2 * columns, depth, True, torch.bfloat16)
    x, codes, scales, bias = inputs["x"], inputs["codes"], inputs["scales"], inputs["bias"]
    wide = torch.randn(rows, columns + 5, generator=torch.Generator().manual_seed(1)).half()
    residual = wide[:, 2:-3]
    gate, up = linear_w8a8(x, pack(codes, scales, group), bias, torch.float32).chunk(2, 1)
    packed = pack(codes, scales, group, backend, gated=True)
    out = linear_w8a8(x, packed, bias, torch.float32, None, "silu", residual)
    assert packed.out_features == columns and out.shape == (rows, columns)
    torch.testing.assert_close(out, functional.silu(gate) * up + residual, rtol=2e-5, atol=1e-5)
    for size in (1, 9) if rows and backend != "triton" else ():
        alone = linear_w8a8(x[:size], packed, bias, torch.float32, None, "silu", residual[:size])
        assert torch.equal(alone, out[:size])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rotation", [16, 64, 256])
def test_rotated_rows_are_those_that_rotate_gives(
    backend: str, rotation: int, group: int | None, dtype: torch.dtype
) -> None:
    inputs = reference.make_inputs(9, 50, 768, True, dtype)
    x, codes, scales, bias = inputs["x"], inputs["codes"], inputs["scales"], inputs["bias"]
    expected = linear_w8a8(rotate(x, rotation), pack(codes, scales, group, backend), bias, dtype)
    packed = pack(codes, scales, group, backend, rotation=rotation)
    assert torch.equal(linear_w8a8(x, packed, bias), expected)
    spoiled = x.clone()
    spoiled[4, 3] = torch.inf
    out = linear_w8a8(spoiled, packed, bias)
    assert out[4].isnan().all() and torch.equal(out[5:], expected[5:])


def test_rotation_spreads_outliers_and_changes_no_product() -> None:
    inputs = reference.make_inputs(20, 64, 576)
    x, weight = inputs["x"], inputs["weight"]
    x[:, 7] *= 40
    exact = x @ weight.T
    torch.testing.assert_close(rotate(x, 64) @ rotate(weight, 64).T, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(rotate(x, 32), 32), x, rtol=1e-5, atol=1e-5)
    errors = []
    for rotation in (None, 64):
        packed = pack(*quantize_weight(weight, rotation), rotation=rotation)
        errors.append(float((linear_w8a8(x, packed) - exact).norm()))
    assert errors[1] < errors[0] / 2


def test_packed_weight_keeps_its_instruction_set() -> None:
    inputs = reference.make_inputs(3, 20, 33)
    packed = pack(inputs["codes"], inputs["scales"])
    before = linear_w8a8(inputs["x"], packed)
    for isa in reversed(native.isas()):
        native.select_isa(isa)
        assert torch.equal(linear_w8a8(inputs["x"], packed), before)


def test_error_of_the_quantizer_and_of_the_product() -> None:
    inputs = reference.make_inputs(40, 64, 1024)
    weight, x = inputs["weight"], inputs["x"]
    codes, scales = quantize_weight(weight)
    assert (codes * scales.unsqueeze(1) - weight).abs().le(scales.unsqueeze(1) * 0.501).all()
    exact = x @ weight.T
    errors = [
        float((linear_w8a8(x, pack(codes, scales, group)) - exact).norm() / exact.norm()) for group in (None, 256, 32)
    ]
    assert errors[0] < 0.014 and errors[0] > errors[1] > errors[2]


def test_what_does_not_fit_is_named() -> None:
    codes, scales = torch.ones(4, 3, dtype=torch.int8), torch.ones(4)
    packed = pack(codes, scales)
    with pytest.raises(ValueError, match=r"x must be \[num_rows, 3\], not \[2, 4\]"):
        linear_w8a8(torch.ones(2, 4), packed)
    with pytest.raises(ValueError, match=r"x is torch.int32; allowed: .*bfloat16"):
        linear_w8a8(torch.ones(2, 3, dtype=torch.int32), packed)
    with pytest.raises(ValueError, match="x_scales must be given where x is torch.int8"):
        linear_w8a8(torch.ones(2, 3, dtype=torch.int8), packed)
    with pytest.raises(ValueError, match=r"x_scales must be torch.float32 \[2\]"):
        linear_w8a8(torch.ones(2, 3, dtype=torch.int8), packed, None, None, torch.ones(3))
    with pytest.raises(ValueError, match=r"bias .*\[5\]"):
        linear_w8a8(torch.ones(2, 3), packed, torch.ones(5))
    with pytest.raises(ValueError, match="out_dtype is torch.int8"):
        linear_w8a8(torch.ones(2, 3), packed, None, torch.int8)
    with pytest.raises(ValueError, match="activation_group is 48; allowed: None, 32"):
        pack(codes, scales, 48)
    with pytest.raises(ValueError, match="rotation is 48; allowed: None, 16"):
        pack(codes, scales, rotation=48)
    with pytest.raises(ValueError, match="rotation is 16; allowed: what divides in_features, 3"):
        pack(codes, scales, rotation=16)
    with pytest.raises(ValueError, match="as many up rows as gate rows, not 3"):
        pack(codes[:3], scales[:3], gated=True)
    with pytest.raises(ValueError, match=r"residual must be floating \[2, 4\], not torch.float32 \[2, 5\]"):
        linear_w8a8(torch.ones(2, 3), packed, residual=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"codes must be torch.int8"):
        pack(codes.int(), scales)
    with pytest.raises(ValueError, match=r"scales must be torch.float32 \[4\]"):
        pack(codes, torch.ones(5))
    with pytest.raises(ValueError, match=r"-128; allowed: -127..127"):
        pack(codes * -128, scales)
