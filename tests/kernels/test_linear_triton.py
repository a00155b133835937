"""Owns the tests of what the Triton linears do by architecture: tiles, descriptors, fp8 met by fp8; and of the rows
they round in front. Does not know a GPU: kernels are interpreted (conftest.py)."""

from collections.abc import Callable

import pytest
import torch
from servd_kernels import linear, linear_fp8, linear_w8a8, linear_wna16, triton_gemm, triton_gemm_rows
from servd_kernels.linear import reference
from servd_kernels.linear import triton as dense
from servd_kernels.linear_fp8 import reference as fp8_reference
from servd_kernels.linear_fp8 import triton as fp8
from servd_kernels.linear_w8a8 import reference as w8a8_reference
from servd_kernels.linear_w8a8 import triton as w8a8
from servd_kernels.linear_wna16 import reference as wna16_reference
from servd_kernels.linear_wna16 import triton as wna16
from servd_kernels.testing import assert_close
from servd_kernels.triton_support import ARCHITECTURES
from servd_kernels.weight_quant import FP8, quantize_fp8, quantize_int8

ROWS, COLUMNS, DEPTH = 70, 150, 208  # the last class of rows, several tiles, a last step that is not full
CASES = ("dense", "gated", "float32", "w8a8", "w8a8 in groups", "w4a16", "w4a8", "fp8 weights", "fp8")

Run = Callable[[torch.Tensor], torch.Tensor]


def cases(name: str, arch: str) -> tuple[torch.Tensor, Run, torch.Tensor]:
    """x, its product in bfloat16 (or float32) with the tiles of the architecture, and what it should be."""
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    if name in ("dense", "gated", "float32"):
        gated = name == "gated"
        inputs = reference.make_inputs(ROWS, COLUMNS, DEPTH, True, dtype)
        packed = dense.pack(inputs["weight"], gated)
        expected = linear.linear(inputs["x"], reference.pack(inputs["weight"], gated), inputs["bias"], None, "silu")
        launch = (dense.launch, packed, inputs["bias"], "silu", None)
    elif name.startswith("w8a8"):
        group = 64 if "groups" in name else None
        inputs = w8a8_reference.make_inputs(ROWS, COLUMNS, DEPTH, True, dtype)
        codes, scales, bias = inputs["codes"], inputs["scales"], inputs["bias"]
        expected = linear_w8a8.linear_w8a8(inputs["x"], w8a8_reference.pack(codes, scales, group), bias)
        launch = (w8a8.launch, w8a8.pack(codes, scales, group), bias, None, None, None)
    elif name.startswith("w4"):
        activations = "int8" if name == "w4a8" else "none"
        inputs = wna16_reference.make_inputs(ROWS, COLUMNS, DEPTH, 4, 32, False, dtype)
        weight, bias = inputs["weight"], inputs["bias"]
        expected = linear_wna16.linear_wna16(inputs["x"], wna16_reference.pack(weight, activations), bias)
        launch = (wna16.launch, wna16.pack_for(arch, weight, activations), bias, None, None)
    else:
        activations = "fp8" if name == "fp8" else "none"
        inputs = fp8_reference.make_inputs(ROWS, COLUMNS, DEPTH, True, dtype)
        codes, scales, bias = inputs["codes"], inputs["scales"], inputs["bias"]
        expected = linear_fp8.linear_fp8(inputs["x"], fp8_reference.pack(codes, scales, activations), bias)
        launch = (fp8.launch, fp8.pack_for(arch, codes, scales, activations), bias, None, None, None)

    def run(x: torch.Tensor) -> torch.Tensor:
        function, *arguments = launch
        out = torch.full((len(x), expected.shape[1]), torch.nan, dtype=dtype)
        function(arch, x, *arguments, out)
        return out

    return inputs["x"], run, expected


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_tiles_of_every_architecture_give_the_same_rows(name: str, arch: str) -> None:
    x, run, expected = cases(name, arch)
    whole = run(x)
    assert_close(whole, expected, "gemm")
    for size in (1, 17):  # of the other two classes
        assert torch.equal(run(x[-size:]), whole[-size:]), f"{size} rows alone"


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_descriptors_and_pointers_read_the_same(arch: str) -> None:
    x, run, _ = cases("dense", arch)
    wide = torch.full((ROWS, DEPTH + 7), torch.nan, dtype=x.dtype)
    wide[:, 3 : DEPTH + 3] = x  # rows at odd multiples of 2 bytes, which TMA cannot read
    weight = torch.zeros(1, 64, dtype=x.dtype)
    assert triton_gemm.takes_descriptors(arch, x, weight)
    assert not triton_gemm.takes_descriptors(arch, wide[:, 3 : DEPTH + 3], weight)
    assert torch.equal(run(wide[:, 3 : DEPTH + 3]), run(x))


@pytest.mark.parametrize("table", ["PLAIN", "INTEGER", "GATED", "GROUPED", "CODED", "SUMMED", "FLOAT32"])
def test_weight_rows_fill_the_instruction_of_the_architecture(table: str) -> None:
    """wgmma and tcgen05 take 64 rows: with fewer Triton would choose mma.sync for one class and not for another."""
    for arch in ("sm_90", "sm_100"):
        assert all(tiles.columns % 64 == 0 for tiles in getattr(triton_gemm, table)[arch].values())


def test_a_nan_among_the_codes_spoils_its_column() -> None:
    inputs = fp8_reference.make_inputs(5, 20, 48)
    codes = inputs["codes"].view(torch.uint8).clone()
    codes[3, 7], codes[11, 0] = 0x7F, 0xFF
    packed = linear_fp8.pack(codes.view(FP8), inputs["scales"], backend="triton")
    is_spoiled = linear_fp8.linear_fp8(inputs["x"], packed).isnan()
    assert is_spoiled[:, [3, 11]].all() and int(is_spoiled.sum()) == 10


@pytest.mark.parametrize("depth", [1, 33, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_as_the_quantizers_do(depth: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, depth, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 0
    x[2, -1] = torch.inf
    x[3, 0] = torch.nan
    for group in (None, 32, 256):
        codes, scales = triton_gemm_rows.quantize(x, triton_gemm_rows.INT8, group)
        expected, expected_scales = quantize_int8(x, group)
        assert torch.equal(codes, expected)
        torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
        assert codes.stride(0) % 16 == 0
    codes, scales = triton_gemm_rows.quantize(x, triton_gemm_rows.E4M3)
    values, _ = triton_gemm_rows.quantize(x, triton_gemm_rows.E4M3_VALUES)
    fp8_codes, expected_scales = quantize_fp8(x)
    assert torch.equal(codes.view(FP8).float(), fp8_codes.float())
    assert torch.equal(values.float(), fp8_codes.float())
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
