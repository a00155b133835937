"""Owns the tests of what the activation ops share: output quantized by row, strided and higher-rank inputs.
Does not know the functions' values (test_silu_and_mul.py, test_gelu.py)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from servd_kernels.activation import LIMITS, quantize_rows
from servd_kernels.gelu import gelu
from servd_kernels.gelu_and_mul import gelu_and_mul
from servd_kernels.silu_and_mul import silu_and_mul

Run = Callable[..., Any]
OPS: dict[str, tuple[Run, int]] = {
    "silu_and_mul": (silu_and_mul, 2),
    "gelu_and_mul": (gelu_and_mul, 2),
    "gelu": (gelu, 1),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows_of(op: str, rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(rows, OPS[op][1] * width, generator=torch.Generator().manual_seed(rows))).to(dtype)


@pytest.mark.parametrize("out_dtype", LIMITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 1536), (9, 130), (0, 8), (2, 4200)])
@pytest.mark.parametrize("op", OPS)
def test_codes_are_those_of_the_rounded_values(
    backend: str, op: str, rows: int, width: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    run, x = OPS[op][0], rows_of(op, rows, width, dtype)
    codes, scales = run(x, out_dtype=out_dtype, backend=backend)
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype) == ((rows, width), out_dtype, (rows,), torch.float32)
    # From the same float32 values the codes are equal; values differ in their last places, so a few codes by one.
    values = run(x.float(), backend=backend)
    expected, expected_scales = quantize_rows(values, out_dtype)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("out_dtype", LIMITS)
def test_codes_give_the_values_back(backend: str, out_dtype: torch.dtype) -> None:
    x = rows_of("silu_and_mul", 5, 300)
    values = silu_and_mul(x, backend=backend)
    codes, scales = silu_and_mul(x, out_dtype, backend=backend)
    error = (codes.float() * scales.unsqueeze(1) - values).abs()
    half_step = (
        0.501 * scales.unsqueeze(1) if out_dtype == torch.int8 else values.abs() / 16 + scales.unsqueeze(1) / 512
    )
    assert bool((error <= half_step).all())
    assert bool((codes.float().abs().amax(1) == LIMITS[out_dtype]).all()), "each row uses its whole range"


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("out_dtype", LIMITS)
def test_rows_that_have_no_scale(backend: str, out_dtype: torch.dtype) -> None:
    x = torch.ones(4, 40)
    x[0], x[1, 3], x[2, 39] = 0, torch.nan, torch.inf
    codes, scales = gelu(x, out_dtype=out_dtype, backend=backend)
    assert scales[0] == 0 and scales[1].isnan() and scales[2].isinf() and scales[3] > 0
    assert not codes[:3].float().any() and bool((codes[3].float() == LIMITS[out_dtype]).all())


@pytest.mark.parametrize("out_dtype", [None, *LIMITS])
@pytest.mark.parametrize("op", OPS)
def test_other_ranks_and_strides(backend: str, op: str, out_dtype: torch.dtype | None) -> None:
    run, x = OPS[op][0], rows_of(op, 6, 20)
    parts = OPS[op][1]
    wide = torch.full((6, 3 * parts * 20), torch.nan)
    wide[:, parts * 20 : 2 * parts * 20] = x
    gaps = torch.full((6, 2 * parts * 20), torch.nan)
    gaps[:, ::2] = x

    def tensors(result: Any) -> list[torch.Tensor]:
        found = [result] if isinstance(result, torch.Tensor) else list(result)
        return [tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor for tensor in found]

    whole = tensors(run(x, out_dtype=out_dtype, backend=backend))
    for other in (wide[:, parts * 20 : 2 * parts * 20], gaps[:, ::2], x.view(2, 3, -1), x.view(1, 2, 3, -1)):
        found = tensors(run(other, out_dtype=out_dtype, backend=backend))
        assert found[0].shape[:-1] == other.shape[:-1]
        assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(found, whole, strict=True))
    first = tensors(run(x[0], out_dtype=out_dtype, backend=backend))
    assert all(torch.equal(a, b[0]) for a, b in zip(first, whole, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_wrong_out_dtype_is_named(op: str) -> None:
    with pytest.raises(ValueError, match=r"out_dtype is torch.uint8; allowed: None, torch.int8, torch.float8_e4m3fn"):
        OPS[op][0](torch.ones(2, 4), out_dtype=torch.uint8)
