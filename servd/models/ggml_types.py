"""Bytes of ggml tensor types to floats, vectorized.

Knows nothing of files or of tensor names. The formats: ggml's `ggml-common.h` (block structs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from servd.errors import ConfigError

# Elements turned at a time: the float32 intermediates (1 MiB each) then stay in the second-level cache.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class GGMLType:
    """How one ggml type lies in memory."""

    block_elements: int
    block_bytes: int
    to_float: Callable[[Tensor], Tensor]  # [num_blocks, block_bytes] uint8 → [num_blocks, block_elements]
    dtype: torch.dtype | None = None  # None: quantized


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, [num_blocks, 1] float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(quants: Tensor) -> Tensor:
    """[num_blocks, n] uint8 → [num_blocks, 2 * n] float32: the low halves of all bytes, then the high ones."""
    values = torch.empty(quants.shape[0], 2, quants.shape[1], dtype=torch.float32)
    values[:, 0] = quants & 15
    values[:, 1] = quants >> 4
    return values.flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).to(torch.float32).mul_(_half(blocks, 0))


def _q4_k(blocks: Tensor) -> Tensor:
    count = blocks.shape[0]
    # Eight 6-bit scales and minima in 12 bytes: the first four of each whole, the others split into 4 + 2 bits.
    low_scales, low_minima, split = blocks[:, 4:16].reshape(count, 3, 4).unbind(1)
    scales = torch.cat([low_scales & 63, (split & 15) | ((low_scales >> 2) & 48)], dim=1)
    minima = torch.cat([low_minima & 63, (split >> 4) | ((low_minima >> 2) & 48)], dim=1)
    values = _nibbles(blocks[:, 16:].reshape(-1, 32)).view(count, 8, 32)
    values.mul_((_half(blocks, 0) * scales).unsqueeze(-1)).sub_((_half(blocks, 2) * minima).unsqueeze(-1))
    return values.flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    count = blocks.shape[0]
    values = torch.empty(count, 2, 4, 32, dtype=torch.float32)  # [block, half, quarter of the half, element]
    low = blocks[:, :128].reshape(count, 2, 2, 32)
    high = blocks[:, 128:192].reshape(count, 2, 32)
    for quarter in range(4):
        four_bits = (low[:, :, quarter % 2] >> (4 * (quarter // 2))) & 15
        two_bits = (high >> (2 * quarter)) & 3
        values[:, :, quarter] = four_bits | (two_bits << 4)
    scales = blocks[:, 192:208].view(torch.int8).to(torch.float32) * _half(blocks, 208)
    return values.view(count, 16, 16).sub_(32).mul_(scales.unsqueeze(-1)).flatten(1)


def _plain(dtype: torch.dtype) -> GGMLType:
    return GGMLType(1, dtype.itemsize, lambda blocks: blocks.view(dtype), dtype)


GGML_TYPES: dict[str, GGMLType] = {
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "Q8_0": GGMLType(32, 34, _q8_0),
    "Q4_0": GGMLType(32, 18, _q4_0),
    "Q4_1": GGMLType(32, 20, _q4_1),
    "Q4_K": GGMLType(256, 144, _q4_k),
    "Q6_K": GGMLType(256, 210, _q6_k),
}


def dequantize(raw: Tensor, ggml_type: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """raw [nbytes] uint8 → `shape` in `dtype`; computed in float32, rounded once.

    Raises ConfigError for a type that is not in GGML_TYPES, or if the number of bytes does not fit the shape.
    """
    if ggml_type not in GGML_TYPES:
        raise ConfigError(f"ggml type is {ggml_type}; allowed: {', '.join(GGML_TYPES)}")
    kind = GGML_TYPES[ggml_type]
    elements = 1
    for extent in shape:
        elements *= extent
    if elements % kind.block_elements or elements // kind.block_elements * kind.block_bytes != raw.numel():
        raise ConfigError(f"{raw.numel()} bytes do not hold the shape {list(shape)} in ggml type {ggml_type}")
    blocks = raw.view(-1, kind.block_bytes)
    output = torch.empty(blocks.shape[0], kind.block_elements, dtype=dtype)
    step = max(1, _CHUNK_ELEMENTS // kind.block_elements)
    for begin in range(0, blocks.shape[0], step):
        output[begin : begin + step] = kind.to_float(blocks[begin : begin + step])
    return output.view(shape)
