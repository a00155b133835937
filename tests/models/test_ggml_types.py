"""Our dequantization against the gguf package's, to the bit.

Knows nothing of files.
"""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch

from servd.errors import ConfigError
from servd.models.ggml_types import GGML_TYPES, dequantize, read_codes

QUANTIZED = [name for name, kind in GGML_TYPES.items() if kind.coding is not None]


def random_blocks(name: str, count: int) -> torch.Tensor:
    """Random bytes are valid blocks; NaN and infinite scales among them included."""
    generator = numpy.random.default_rng(3)
    return torch.from_numpy(generator.integers(0, 256, count * GGML_TYPES[name].block_bytes, dtype=numpy.uint8))


@pytest.mark.parametrize("name", QUANTIZED)
def test_random_bytes_give_the_same_floats_as_the_gguf_package(name: str) -> None:
    count = 3 * 1024 + 5  # more than one chunk, the last one short
    raw, kind = random_blocks(name, count), gguf.GGMLQuantizationType[name]
    with numpy.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(raw.numpy().reshape(count, -1), kind))
    ours = dequantize(raw, name, (count, GGML_TYPES[name].block_elements), torch.float32)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantized_values_come_back_within_half_a_step(name: str) -> None:
    values = numpy.random.default_rng(0).standard_normal((6, 64), dtype=numpy.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    ours = dequantize(torch.from_numpy(raw.reshape(-1)), name, (6, 64), torch.float32)
    span = values.max() - values.min()
    assert (ours - torch.from_numpy(values)).abs().max() < span / (250 if name == "Q8_0" else 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_types_are_cast_once(name: str, dtype: torch.dtype) -> None:
    stored = torch.randn(5, 7).to(GGML_TYPES[name].dtype)
    ours = dequantize(stored.view(torch.uint8).flatten(), name, (5, 7), dtype)
    assert ours.dtype == dtype and torch.equal(ours, stored.to(dtype))


@pytest.mark.parametrize("name", QUANTIZED)
def test_half_precision_is_the_float32_result_rounded_once(name: str) -> None:
    raw, shape = random_blocks(name, 64), (64, GGML_TYPES[name].block_elements)
    exact = dequantize(raw, name, shape, torch.float32)
    assert torch.equal(dequantize(raw, name, shape, torch.bfloat16).nan_to_num(), exact.bfloat16().nan_to_num())


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_and_scales_stand_for_the_same_floats(name: str) -> None:
    count = 1024 + 5
    raw, shape = random_blocks(name, 3 * count), (count, 3 * GGML_TYPES[name].block_elements)
    weight = read_codes(raw, name, shape)
    assert weight is not None
    expected, ours = dequantize(raw, name, shape, torch.float32), weight.dequantize()
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


def test_what_is_no_coded_matrix_has_no_codes() -> None:
    assert read_codes(torch.zeros(4 * 34, dtype=torch.uint8), "Q8_0", (4, 32)) is not None
    assert read_codes(torch.zeros(4 * 34, dtype=torch.uint8), "Q8_0", (128,)) is None
    assert read_codes(torch.zeros(4 * 34, dtype=torch.uint8), "Q8_0", (8, 16)) is None  # blocks would span rows
    assert read_codes(torch.zeros(16, dtype=torch.uint8), "F32", (2, 2)) is None


def test_unsupported_type_names_the_supported_ones() -> None:
    allowed = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K"
    with pytest.raises(ConfigError, match=f"ggml type is IQ2_XXS; allowed: {allowed}"):
        dequantize(torch.zeros(66, dtype=torch.uint8), "IQ2_XXS", (256,), torch.float32)


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"40 bytes do not hold the shape \[32\]"):
        dequantize(torch.zeros(40, dtype=torch.uint8), "Q4_1", (32,), torch.float32)
