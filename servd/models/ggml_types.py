"""Bytes of ggml tensor types to codes and scales, or to floats, vectorized.

Knows nothing of files or of tensor names. The formats: ggml's `ggml-common.h` (block structs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor

from servd.errors import ConfigError

# Elements turned at a time: the float32 intermediates (1 MiB each) then stay in the second-level cache.
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class _Codes:
    """A weight is (code - middle of the codes' range) * scale or, where there are minima, code * scale + minimum."""

    codes: Tensor  # [num_blocks, block_elements] uint8
    scales: Tensor  # [num_blocks, groups of a block] float32
    minima: Tensor | None = None  # like scales


@dataclass(frozen=True, slots=True)
class Coding:
    """How a quantized type's blocks come apart."""

    bits: int  # of a code once it is unpacked
    group_size: int  # elements that share a scale
    scale_dtype: torch.dtype  # what holds the scales exactly
    unpack: Callable[[Tensor], _Codes]  # [num_blocks, block_bytes] uint8

    def to_float(self, blocks: Tensor) -> Tensor:
        """[num_blocks, block_bytes] uint8 → [num_blocks, block_elements] float32."""
        parts = self.unpack(blocks)
        values = torch.unflatten(parts.codes.to(torch.float32), 1, (-1, self.group_size))
        if parts.minima is None:
            return values.sub_(2 ** (self.bits - 1)).mul_(parts.scales.unsqueeze(-1)).flatten(1)
        return values.mul_(parts.scales.unsqueeze(-1)).add_(parts.minima.unsqueeze(-1)).flatten(1)


@dataclass(frozen=True, slots=True)
class GGMLType:
    """How one ggml type lies in memory."""

    block_elements: int
    block_bytes: int
    dtype: torch.dtype | None = None  # of a plain type
    coding: Coding | None = None  # of a quantized one


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, [num_blocks, 1] float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(quants: Tensor) -> Tensor:
    """[num_blocks, n] uint8 → [num_blocks, 2 * n] uint8: the low halves of all bytes, then the high ones."""
    values = torch.empty(quants.shape[0], 2, quants.shape[1], dtype=torch.uint8)
    torch.bitwise_and(quants, 15, out=values[:, 0])
    torch.bitwise_right_shift(quants, 4, out=values[:, 1])
    return values.flatten(1)


def _q4_0(blocks: Tensor) -> _Codes:
    return _Codes(_nibbles(blocks[:, 2:]), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> _Codes:
    return _Codes(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> _Codes:
    return _Codes(blocks[:, 2:] ^ 128, _half(blocks, 0))  # signed numbers, 128 more than they are


def _q4_k(blocks: Tensor) -> _Codes:
    # Eight 6-bit scales and minima in 12 bytes: the first four of each whole, the others split into 4 + 2 bits.
    low_scales, low_minima, split = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat([low_scales & 63, (split & 15) | ((low_scales >> 2) & 48)], dim=1)
    minima = torch.cat([low_minima & 63, (split >> 4) | ((low_minima >> 2) & 48)], dim=1)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 32)).view(-1, 256)
    return _Codes(codes, _half(blocks, 0) * scales, _half(blocks, 2).neg() * minima)


def _q6_k(blocks: Tensor) -> _Codes:
    codes = torch.empty(blocks.shape[0], 2, 4, 32, dtype=torch.uint8)  # [block, half, quarter of the half, element]
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 32)
    for quarter in range(4):
        four_bits = (low[:, :, quarter % 2] >> (4 * (quarter // 2))) & 15
        two_bits = (high >> (2 * quarter)) & 3
        codes[:, :, quarter] = four_bits | (two_bits << 4)
    scales = blocks[:, 192:208].view(torch.int8).to(torch.float32) * _half(blocks, 208)
    return _Codes(codes.flatten(1).add_(128 - 32), scales)  # six bits less 32, as eight bits less 128


def _plain(dtype: torch.dtype) -> GGMLType:
    return GGMLType(1, dtype.itemsize, dtype=dtype)


GGML_TYPES: dict[str, GGMLType] = {
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "Q8_0": GGMLType(32, 34, coding=Coding(8, 32, torch.float16, _q8_0)),
    "Q4_0": GGMLType(32, 18, coding=Coding(4, 32, torch.float16, _q4_0)),
    "Q4_1": GGMLType(32, 20, coding=Coding(4, 32, torch.float16, _q4_1)),
    # Products of a float16 and an integer of 6 or 8 bits: only float32 holds them exactly.
    "Q4_K": GGMLType(256, 144, coding=Coding(4, 32, torch.float32, _q4_k)),
    "Q6_K": GGMLType(256, 210, coding=Coding(8, 16, torch.float32, _q6_k)),
}


def dequantize(raw: Tensor, ggml_type: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """raw [nbytes] uint8 → `shape` in `dtype`; computed in float32, rounded once.

    Raises ConfigError for a type that is not in GGML_TYPES, or if the number of bytes does not fit the shape.
    """
    kind = _kind_that_fits(raw, ggml_type, shape)
    blocks = raw.view(-1, kind.block_bytes)
    output = torch.empty(blocks.shape[0], kind.block_elements, dtype=dtype)
    for rows in _chunks(blocks.shape[0], kind):
        if kind.coding is not None:
            output[rows] = kind.coding.to_float(blocks[rows])
        elif kind.dtype is not None:
            output[rows] = blocks[rows].view(kind.dtype)
    return output.view(shape)


def read_codes(raw: Tensor, ggml_type: str, shape: tuple[int, ...]) -> GroupedWeight | None:
    """raw [nbytes] uint8 of a matrix → its codes and scales, the exact values of the file.

    None for what holds no codes: a plain type, or no matrix. Raises ConfigError as `dequantize` does.
    """
    kind = _kind_that_fits(raw, ggml_type, shape)
    coding = kind.coding
    if coding is None or len(shape) != 2 or shape[1] % kind.block_elements:
        return None
    blocks = raw.view(-1, kind.block_bytes)
    count, groups = blocks.shape[0], kind.block_elements // coding.group_size
    codes = torch.empty(count, kind.block_elements, dtype=torch.uint8)
    scales, minima = (torch.empty(count, groups, dtype=coding.scale_dtype) for _ in range(2))
    has_minima = False
    for rows in _chunks(count, kind):
        parts = coding.unpack(blocks[rows])
        codes[rows], scales[rows] = parts.codes, parts.scales
        if parts.minima is not None:
            minima[rows], has_minima = parts.minima, True
    by_row = (shape[0], shape[1] // coding.group_size)
    return GroupedWeight(
        codes.view(shape),
        scales.view(by_row),
        coding.bits,
        coding.group_size,
        minima=minima.view(by_row) if has_minima else None,
    )


def _kind_that_fits(raw: Tensor, ggml_type: str, shape: tuple[int, ...]) -> GGMLType:
    if ggml_type not in GGML_TYPES:
        raise ConfigError(f"ggml type is {ggml_type}; allowed: {', '.join(GGML_TYPES)}")
    kind, elements = GGML_TYPES[ggml_type], math.prod(shape)
    if elements % kind.block_elements or elements // kind.block_elements * kind.block_bytes != raw.numel():
        raise ConfigError(f"{raw.numel()} bytes do not hold the shape {list(shape)} in ggml type {ggml_type}")
    return kind


def _chunks(num_blocks: int, kind: GGMLType) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // kind.block_elements)
    return (slice(begin, begin + step) for begin in range(0, num_blocks, step))
