"""Owns the tests of linear.
Does not know which backends exist (conftest.py)."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from servd_kernels import native
from servd_kernels.linear import linear, pack, reference
from servd_kernels.testing import assert_close
from torch.nn import functional

SHAPES = [
    (0, 5, 3),
    (1, 1, 1),
    (1, 49, 7),
    (3, 97, 66),
    (7, 48, 33),
    (9, 101, 576),
    (66, 50, 65),
    (130, 192, 100),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_matches_float64(
    backend: str, rows: int, columns: int, depth: int, with_bias: bool, dtype: torch.dtype
) -> None:
    inputs = reference.make_inputs(rows, columns, depth, with_bias, dtype)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    out = linear(x, pack(weight, backend), bias)
    assert out.shape == (rows, columns) and out.dtype == dtype
    assert_close(out, expected, "gemm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_float32_out_keeps_what_rounding_would_lose(backend: str, dtype: torch.dtype, with_bias: bool) -> None:
    inputs = reference.make_inputs(9, 101, 576, with_bias, dtype)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    out = linear(x, pack(weight, backend), bias, torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_another_out_dtype_is_refused() -> None:
    inputs = reference.make_inputs(1, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="out_dtype"):
        linear(inputs["x"], pack(inputs["weight"]), None, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_rows_with_nan_around(backend: str, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(5, 20, 33, dtype=dtype)
    wide = torch.full((5, 40), torch.nan, dtype=dtype)
    wide[:, 3:36] = inputs["x"]
    packed = pack(inputs["weight"], backend)
    assert torch.equal(linear(wide[:, 3:36], packed), linear(inputs["x"], packed))


def test_nan_stays_in_its_row(backend: str) -> None:
    inputs = reference.make_inputs(11, 20, 33)
    packed = pack(inputs["weight"], backend)
    clean = linear(inputs["x"], packed)
    inputs["x"][4, 32] = torch.nan
    spoiled = linear(inputs["x"], packed)
    assert spoiled[4].isnan().all()
    assert torch.equal(torch.cat([spoiled[:4], spoiled[5:]]), torch.cat([clean[:4], clean[5:]]))


def test_packed_weight_keeps_its_instruction_set() -> None:
    inputs = reference.make_inputs(3, 20, 33)
    packed = pack(inputs["weight"])
    before = linear(inputs["x"], packed)
    for isa in reversed(native.isas()):
        native.select_isa(isa)
        assert torch.equal(linear(inputs["x"], packed), before)


def test_wrong_shapes_are_named() -> None:
    packed = pack(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"x must be \[num_rows, 3\], not \[2, 4\]"):
        linear(torch.ones(2, 4), packed)
    with pytest.raises(ValueError, match=r"bias .*\[5\]"):
        linear(torch.ones(2, 3), packed, torch.ones(5))
    with pytest.raises(ValueError, match="bfloat16"):
        linear(torch.ones(2, 3, dtype=torch.bfloat16), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (49, 7), (101, 576)])
def test_rows_of_a_packed_weight_come_back_exactly(backend: str, columns: int, depth: int, dtype: torch.dtype) -> None:
    weight = reference.make_inputs(1, columns, depth, dtype=dtype)["weight"]
    ids = torch.randint(columns, (70,), generator=torch.Generator().manual_seed(0))
    rows = pack(weight, backend).rows
    assert torch.equal(rows(ids), weight[ids])
    assert torch.equal(rows(ids[::2]), weight[ids[::2]])
    assert rows(ids[:0]).shape == (0, depth)


@pytest.mark.parametrize("row", [-1, 5])
def test_rows_outside_the_weight_are_refused(backend: str, row: int) -> None:
    packed = pack(torch.ones(5, 3), backend)
    with pytest.raises(IndexError):
        packed.rows(torch.tensor([0, row]))


NATIVE_VARIANTS = [f"cpu-{isa}" for isa in native.isas()]
ACTIVATIONS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda x: x,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 1, 3), (9, 101, 66), (70, 50, 33)])
def test_what_follows_the_product_is_fused(
    backend: str, rows: int, columns: int, depth: int, gated: bool, activation: str | None, dtype: torch.dtype
) -> None:
    inputs = reference.make_inputs(rows, columns * (2 if gated else 1), depth, True, dtype)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    wide = torch.full((rows, columns + 3), torch.nan, dtype=dtype)
    residual = wide[:, 2 : columns + 2]
    residual.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)))
    product = x.double() @ weight.double().T + bias.double()
    if gated:
        gate, up = product.chunk(2, dim=1)
        expected = ACTIVATIONS[activation](gate) * up
    else:
        expected = ACTIVATIONS[activation](product)
    packed = pack(weight, backend, gated)
    for out_dtype in (dtype, torch.float32):
        plain = linear(x, packed, bias, out_dtype, activation)
        assert plain.shape == (rows, columns) and plain.dtype == out_dtype
        assert_close(plain, expected, "gemm", 2.0)
        assert_close(linear(x, packed, bias, out_dtype, activation, residual), expected + residual, "gemm", 2.0)


def exact(activation: str | None, x: torch.Tensor) -> torch.Tensor:
    """In float64, and by erfc where torch's gelu adds erf to 1 and loses the digits of small results."""
    if activation == "gelu":
        tail: torch.Tensor = torch.special.erfc(-x / 2**0.5)
        return 0.5 * x * tail
    if activation == "gelu_tanh":
        return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return functional.silu(x)


@pytest.mark.parametrize("backend", NATIVE_VARIANTS, indirect=True)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_an_activation_keeps_the_digits_of_small_results(backend: str, activation: str) -> None:
    x = torch.linspace(-12, 12, 4801).reshape(-1, 1)
    out = linear(x, pack(torch.ones(1, 1), backend), activation=activation).double()
    expected = exact(activation, x.double())
    torch.testing.assert_close(out, expected, rtol=5e-7, atol=1e-7)
    torch.testing.assert_close(out[x >= -3], expected[x >= -3], rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("backend", NATIVE_VARIANTS, indirect=True)
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh"])
def test_infinity_and_nan_pass_through_an_activation(backend: str, activation: str | None) -> None:
    x = torch.tensor([[torch.inf], [torch.nan], [1.0]])
    out = linear(x, pack(torch.ones(1, 1), backend), activation=activation)
    assert out[0, 0] == torch.inf and out[1, 0].isnan() and out[2, 0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [1023, 1024, 1025, 2600])
def test_blocks_of_depth_change_no_bit(backend: str, depth: int, dtype: torch.dtype) -> None:
    """A zero column more moves every block boundary, and adds exact zeros at the end of every sum."""
    inputs = reference.make_inputs(67, 50, depth, dtype=dtype)
    x, weight = inputs["x"], inputs["weight"]
    packed = pack(weight, backend)
    whole = linear(x, packed)
    assert_close(whole, x.double() @ weight.double().T, "gemm", 4.0)
    for size in (8, 65) if backend == "triton" else (1, 8, 17, 65):
        assert torch.equal(torch.cat([linear(part, packed) for part in x.split(size)]), whole)
    if backend == "reference":
        return  # torch picks its order of summation by depth
    for more in (2, 2000):
        longer = linear(functional.pad(x, (0, more)), pack(functional.pad(weight, (0, more)), backend))
        assert torch.equal(longer, whole)


def test_a_gate_has_the_bits_of_its_parts(backend: str) -> None:
    inputs = reference.make_inputs(9, 202, 66)
    x, weight = inputs["x"], inputs["weight"]
    gate, up = (linear(x, pack(part, backend)) for part in weight.chunk(2))
    assert torch.equal(linear(x, pack(weight, backend, gated=True)), gate * up)


def test_zero_depth_gives_the_bias(backend: str) -> None:
    bias = torch.arange(5.0)
    out = linear(torch.empty(3, 0), pack(torch.empty(5, 0), backend), bias)
    assert torch.equal(out, bias.expand(3, 5))


def test_wrong_gates_residuals_and_activations_are_named() -> None:
    with pytest.raises(ValueError, match="not 5 in all"):
        pack(torch.ones(5, 3), gated=True)
    packed = pack(torch.ones(4, 3), gated=True)
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \[4\], not torch.float32 \[2\]"):
        linear(x, packed, torch.ones(2))
    with pytest.raises(ValueError, match=r"residual must be torch.float32 \[2, 2\]"):
        linear(x, packed, residual=torch.ones(2, 4))
    with pytest.raises(ValueError, match="residual"):
        linear(x, packed, residual=torch.ones(2, 4)[:, ::2])
    with pytest.raises(ValueError, match=r"activation must be one of None, silu, gelu, gelu_tanh, not 'relu'"):
        linear(x, packed, activation="relu")
    with pytest.raises(ValueError, match="gated"):
        packed.rows(torch.tensor([0]))


def test_threads_that_load_the_library_together_get_one() -> None:
    program = (
        "import threading; from servd_kernels import native; found = []; "
        "threads = [threading.Thread(target=lambda: found.append(native.library())) for _ in range(8)]; "
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]; "
        "assert len(found) == 8 and len(set(map(id, found))) == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
