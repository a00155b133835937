"""Owns how keys and values lie in a block of the paged cache: codes, scales, their places; and that in plain torch.
Does not know requests, block tables or speed: kernels read the same numbers from a `KVFormat`.

A layer's cache is one byte tensor [num_blocks, block_bytes], so that copies and swaps move values and scales together.
A block holds, for each key/value head in turn: key codes, value codes, key scales, value scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVCode:
    """How one side, keys or values, is stored."""

    name: str
    bits: int
    num_params: int = 0  # float16 numbers for each group: none, a scale, or a scale and a minimum
    max_group: int = 0  # dimensions that share them; 0: the whole head
    is_rotated: bool = False  # by a Hadamard transform of the head, which spreads outliers over its dimensions
    dtype: torch.dtype = torch.uint8

    def group_size(self, head_dim: int) -> int:
        """Dimensions that share one set of parameters: the largest power of two in reach that divides the head."""
        if self.max_group == 0:
            return head_dim
        return min(self.max_group, head_dim & -head_dim)


FP8_LIMITS = tuple(range(448, 255, -32))  # the numbers of e4m3's top octave
FIT_PASSES = 3  # of int4's scale and minimum; a fourth gains next to nothing

CODES = {
    code.name: code
    for code in (
        KVCode("float32", 32, dtype=torch.float32),
        KVCode("bfloat16", 16, dtype=torch.bfloat16),
        KVCode("float16", 16, dtype=torch.float16),
        KVCode("fp8_e4m3", 8, num_params=1),
        KVCode("int8", 8, num_params=1),
        KVCode("int4", 4, num_params=2, max_group=32, is_rotated=True),
    )
}


@dataclass(frozen=True)
class KVSide:
    """Where one side's numbers lie within the part of a block that belongs to one head; bytes."""

    code: KVCode
    head_dim: int
    block_size: int
    data_offset: int  # codes: [block_size, row_bytes], or in words (see KVFormat.key_words)
    params_offset: int  # float16 [num_groups, num_params, block_size]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one token's codes."""
        return self.head_dim * self.code.bits // 8

    @cached_property
    def num_groups(self) -> int:
        return self.head_dim // self.code.group_size(self.head_dim) if self.code.num_params else 0

    @cached_property
    def params_bytes(self) -> int:
        """Bytes of one token's scales and minima."""
        return 2 * self.num_groups * self.code.num_params


@dataclass(frozen=True)
class KVFormat:
    """The layout of a block. `key_words`: keys lie as [row_bytes / 4, block_size] words of 4 bytes, not as
    [block_size, row_bytes], so that CPU vectors hold the same dimensions of 16 neighbouring tokens."""

    key: str
    value: str
    num_kv_heads: int
    head_dim: int
    block_size: int
    key_words: bool = False

    def __post_init__(self) -> None:
        for side, name in (("key", self.key), ("value", self.value)):
            if name not in CODES:
                raise ValueError(f"{side} is {name!r}; allowed: {', '.join(CODES)}")
        if self.head_dim % 8:
            raise ValueError(f"head_dim is {self.head_dim}; allowed: a multiple of 8")

    @cached_property
    def k(self) -> KVSide:
        return KVSide(CODES[self.key], self.head_dim, self.block_size, 0, self._data_bytes)

    @cached_property
    def v(self) -> KVSide:
        offset = self.block_size * self.k.row_bytes
        params = self._data_bytes + self.block_size * self.k.params_bytes
        return KVSide(CODES[self.value], self.head_dim, self.block_size, offset, params)

    @cached_property
    def _data_bytes(self) -> int:
        return self.block_size * self.head_dim * (CODES[self.key].bits + CODES[self.value].bits) // 8

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of one head's part of a block; a multiple of 4."""
        params = self.block_size * (self.k.params_bytes + self.v.params_bytes)
        return (self._data_bytes + params + 3) // 4 * 4

    @cached_property
    def block_bytes(self) -> int:
        return self.num_kv_heads * self.head_bytes

    @cached_property
    def is_plain(self) -> bool:
        """Both sides hold floating-point numbers as they are."""
        return self.k.code.num_params == 0 and self.v.code.num_params == 0

    @property
    def native_layout(self) -> Tensor:
        """The layout as int64 numbers on the host, in the order of `KVLayout` in common/kv_side.hpp."""
        return _native_layout(self)

    def allocate(self, num_blocks: int, device: torch.device | str = "cpu") -> Tensor:
        """A cache [num_blocks, block_bytes] uint8, undefined but for the null block, which is zero."""
        cache = torch.empty(num_blocks, self.block_bytes, dtype=torch.uint8, device=device)
        cache[:1].zero_()
        return cache

    def check(self, kv_cache: Tensor) -> None:
        """Raises ValueError if `kv_cache` is not a cache of this format."""
        if kv_cache.dim() != 2 or kv_cache.shape[1] != self.block_bytes or kv_cache.dtype != torch.uint8:
            shape = f"{kv_cache.dtype} {list(kv_cache.shape)}"
            raise ValueError(f"kv_cache must be torch.uint8 [num_blocks, {self.block_bytes}], not {shape}")
        if not kv_cache.is_contiguous():
            raise ValueError(f"kv_cache must be contiguous, not of strides {list(kv_cache.stride())}")

    # --- plain torch, for the references, tests and tools ---------------------------------------------------

    def codes(self, kv_cache: Tensor, side: KVSide) -> Tensor:
        """A view of one side's codes: bytes [num_blocks, num_kv_heads, block_size, row_bytes] (words undone)."""
        heads = kv_cache.view(len(kv_cache), self.num_kv_heads, self.head_bytes)
        data = heads[:, :, side.data_offset : side.data_offset + self.block_size * side.row_bytes]
        if side is self.k and self.key_words:
            words = torch.unflatten(data, 2, (side.row_bytes // 4, self.block_size, 4))
            return words.transpose(2, 3)  # [.., block_size, row_bytes / 4, 4]: flattening would copy
        return torch.unflatten(data, 2, (self.block_size, side.row_bytes // 4, 4))

    def params(self, kv_cache: Tensor, side: KVSide) -> Tensor:
        """A view of one side's parameters: float16 [num_blocks, num_kv_heads, num_groups, num_params, block_size]."""
        heads = kv_cache.view(len(kv_cache), self.num_kv_heads, self.head_bytes)
        end = side.params_offset + self.block_size * side.params_bytes
        shape = (side.num_groups, side.code.num_params, self.block_size)
        return torch.unflatten(heads[:, :, side.params_offset : end].view(torch.float16), 2, shape)

    def write(self, kv_cache: Tensor, side: KVSide, slots: Tensor, x: Tensor) -> None:
        """Stores x [num_tokens, num_kv_heads, head_dim] at slots [num_tokens] (block * block_size + offset)."""
        block, offset = slots // self.block_size, slots % self.block_size
        codes, params = encode(x, side.code)
        self.codes(kv_cache, side)[block, :, offset] = torch.unflatten(codes, -1, (-1, 4))
        if params is not None:
            self.params(kv_cache, side)[block, :, :, :, offset] = params

    def read(self, kv_cache: Tensor, side: KVSide, slots: Tensor) -> Tensor:
        """What `write` stored, as float32 [num_tokens, num_kv_heads, head_dim]; rotated if the code is."""
        block, offset = slots // self.block_size, slots % self.block_size
        codes = self.codes(kv_cache, side)[block, :, offset].flatten(-2)
        params = self.params(kv_cache, side)[block, :, :, :, offset] if side.code.num_params else None
        return decode(codes, params, side.code)


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension (its own inverse), float32 inside.

    In blocks of the largest power of two that divides the dimension: 64 of 64, 16 of 80, 32 of 96.
    """
    dim = x.shape[-1]
    width = dim & -dim
    y = torch.unflatten(x.float(), -1, (dim // width, width))
    step = 1
    while step < width:
        pairs = torch.unflatten(y, -1, (width // (2 * step), 2, step))
        first, second = pairs.unbind(-2)
        y = torch.stack([first + second, first - second], -2).flatten(-3)
        step *= 2
    out: Tensor = (y * width**-0.5).flatten(-2).to(x.dtype)
    return out


def encode(x: Tensor, code: KVCode) -> tuple[Tensor, Tensor | None]:
    """x [..., head_dim] -> codes [..., row_bytes] uint8 and parameters [..., num_groups, num_params] float16.

    A group that holds NaN or infinity decodes to NaN. A rotated code expects x rotated already.
    """
    if code.num_params == 0:
        return x.to(code.dtype).contiguous().view(torch.uint8), None
    return _ENCODERS[code.name](x.float(), code)


def decode(codes: Tensor, params: Tensor | None, code: KVCode) -> Tensor:
    """codes [..., row_bytes] uint8 and parameters [..., num_groups, num_params] -> float32 [..., head_dim]."""
    if params is None:
        return codes.contiguous().view(code.dtype).float()
    if code.bits == 4:
        numbers = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float()
    else:
        numbers = codes.contiguous().view(torch.float8_e4m3fn if code.name == "fp8_e4m3" else torch.int8).float()
    groups = torch.unflatten(numbers, -1, (params.shape[-2], -1))
    out = groups * params[..., :1].float()
    if code.num_params == 2:
        out = out + params[..., 1:].float()
    return out.flatten(-2)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale; zero where the scale is zero: then x is too small for float16 to tell."""
    return torch.where(scale == 0, 0.0, x / scale)


def _encode_int8(x: Tensor, code: KVCode) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / 127).half()
    numbers = _scaled(x, scale.float()).round().clamp(-127, 127).nan_to_num()
    return numbers.to(torch.int8).view(torch.uint8), scale.unsqueeze(-2)


def _encode_fp8(x: Tensor, code: KVCode) -> tuple[Tensor, Tensor]:
    """The largest magnitude lands on that number of e4m3's top octave with which the row's squared error is least: a
    third off the divergence that 448 alone gives, measured on the starter model."""
    most = x.abs().amax(-1, keepdim=True)
    for limit in FP8_LIMITS:
        scale = (most / limit).half()
        numbers = _scaled(x, scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        error = (numbers.float() * scale.float() - x).square().sum(-1, keepdim=True)
        if limit == FP8_LIMITS[0]:
            best_numbers, best_scale, least = numbers.view(torch.uint8), scale, error
        else:
            is_better = error < least
            best_numbers = torch.where(is_better, numbers.view(torch.uint8), best_numbers)
            best_scale = torch.where(is_better, scale, best_scale)
            least = torch.where(is_better, error, least)
    return best_numbers, best_scale.unsqueeze(-2)


def _encode_int4(x: Tensor, code: KVCode) -> tuple[Tensor, Tensor]:
    """Range first, then FIT_PASSES of least squares: the scale and minimum that suit the codes, the codes that suit
    those; each group keeps the best pass. On the starter model that takes a quarter off the keys' divergence."""
    groups = torch.unflatten(x, -1, (-1, code.group_size(x.shape[-1])))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    mean = groups.mean(-1, keepdim=True)
    scale, minimum = (high - low) / 15, low
    for fit in range(FIT_PASSES + 1):
        params = torch.cat([scale, minimum], -1).half()
        stored_scale, stored_minimum = torch.split(params.float(), 1, -1)
        numbers = _scaled(groups - stored_minimum, stored_scale).round().clamp(0, 15).nan_to_num()
        error = (numbers * stored_scale + stored_minimum - groups).square().sum(-1, keepdim=True)
        if fit == 0:
            best_numbers, best_params, least = numbers, params, error
        else:
            is_better = error < least
            best_numbers = torch.where(is_better, numbers, best_numbers)
            best_params = torch.where(is_better, params, best_params)
            least = torch.where(is_better, error, least)
        average = numbers.mean(-1, keepdim=True)
        spread = (numbers - average).square().sum(-1, keepdim=True)
        scale = ((numbers - average) * (groups - mean)).sum(-1, keepdim=True) / spread.clamp_min(1e-9)
        minimum = mean - average * scale
    packed = best_numbers.flatten(-2).to(torch.uint8)
    return packed[..., ::2] | packed[..., 1::2] << 4, best_params


_ENCODERS: dict[str, Callable[[Tensor, KVCode], tuple[Tensor, Tensor]]] = {
    "int8": _encode_int8,
    "fp8_e4m3": _encode_fp8,
    "int4": _encode_int4,
}


@cache  # for ever: recorded steps hold the address
def _native_layout(kv_format: KVFormat) -> Tensor:
    numbers = [kv_format.block_bytes, kv_format.head_bytes, kv_format.num_kv_heads]
    numbers += [kv_format.block_size, kv_format.head_dim]
    for side in (kv_format.k, kv_format.v):
        code = side.code
        numbers += [list(CODES).index(code.name), side.data_offset, side.params_offset, side.row_bytes]
        numbers += [code.group_size(kv_format.head_dim), side.num_groups * code.num_params, code.is_rotated]
        numbers += [side is kv_format.k and kv_format.key_words]
    return torch.tensor(numbers, dtype=torch.int64)
