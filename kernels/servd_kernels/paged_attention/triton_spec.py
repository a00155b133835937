"""Owns what is fixed when a Triton attention kernel is compiled: the places of codes, the options, the sizes of tiles.
Does not know tensors or the launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from servd_kernels.kv_format import KVFormat, KVSide
from servd_kernels.paged_attention.options import AttentionOptions

SPAN = 512
"""Keys of a span. Spans are counted from token 0; each has its own softmax, and they merge in ascending order, so that
one program may run all of a row's spans, or many programs one each, to the same bits."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class SideSpec:
    """Where one side's codes lie, in elements of the pointer that reads them, and what they become."""

    operand: tl.dtype  # of the matrix product
    bits: int
    block_stride: int
    head_stride: int
    offset: int  # of the first row
    row: int  # elements of a row
    params_offset: int  # in float16
    group: int  # dimensions that share a scale and a minimum; 0: a token has one scale, or none
    num_groups: int
    is_scaled: bool  # by one factor a token
    is_fp8: bool


@dataclass(frozen=True)
class Spec:
    """All that a kernel's arithmetic depends on, but for the rows of a tile, which change no row's bits."""

    k: SideSpec
    v: SideSpec
    group: int  # query heads of a kv head
    head_dim: int
    width: int  # head_dim, padded to a power of two
    block_size: int
    params_block: int  # stride of a block's parameters, in float16
    params_head: int
    turned: int  # width of the Hadamard transform that the values carry; 1: none
    keys: int  # of a tile; a divisor of SPAN
    window: int
    sinks: int
    softcap: float
    log_train_len: float  # of logn scaling; 0: none
    has_alibi: bool
    has_sink_logits: bool
    has_bias: bool  # something comes between the scale and the softmax


@dataclass(frozen=True)
class Tiles:
    """Sizes that differ by architecture. Prefill and decode must multiply by the same instruction, and their warps must
    share the rows of a tile, not its keys: else a row's sums would differ in order. On sm_90 and sm_100 the instruction
    is that of 64 rows, though a decode fills few of them."""

    prefill_rows: int
    prefill_warps: int
    prefill_stages: int
    decode_rows: int
    decode_warps: int
    decode_stages: int
    keys: int


def _side(side: KVSide, kv_format: KVFormat, dtype: torch.dtype) -> SideSpec:
    code = side.code
    unit = code.dtype.itemsize if code.num_params == 0 else 1
    return SideSpec(
        operand=_DTYPES[_operand(side, dtype)],
        bits=code.bits,
        block_stride=kv_format.block_bytes // unit,
        head_stride=kv_format.head_bytes // unit,
        offset=side.data_offset // unit,
        row=side.row_bytes // unit,
        params_offset=side.params_offset // 2,
        group=code.group_size(side.head_dim) if code.num_params == 2 else 0,
        num_groups=side.num_groups,
        is_scaled=code.num_params == 1,
        is_fp8=code.name == "fp8_e4m3",
    )


@lru_cache(maxsize=256)
def _spec(
    kv_format: KVFormat, group: int, dtype: torch.dtype, keys: int, numbers: tuple[int, int, float, int], extras: int
) -> Spec:
    window, sinks, softcap, logn = numbers
    return Spec(
        k=_side(kv_format.k, kv_format, dtype),
        v=_side(kv_format.v, kv_format, dtype),
        group=group,
        head_dim=kv_format.head_dim,
        width=max(32, triton.next_power_of_2(kv_format.head_dim)),  # an operand's least, with nibbles taken apart
        block_size=kv_format.block_size,
        params_block=kv_format.block_bytes // 2,
        params_head=kv_format.head_bytes // 2,
        turned=kv_format.head_dim & -kv_format.head_dim if kv_format.v.code.is_rotated else 1,
        keys=keys,
        window=window,
        sinks=sinks,
        softcap=softcap,
        log_train_len=math.log(logn) if logn else 0.0,
        has_alibi=bool(extras & 1),
        has_sink_logits=bool(extras & 2),
        has_bias=bool(extras & 1) or softcap > 0,
    )


def make_spec(kv_format: KVFormat, group: int, dtype: torch.dtype, keys: int, options: AttentionOptions) -> Spec:
    numbers = (options.sliding_window, options.num_sink_tokens, options.logit_softcap, options.logn_train_len)
    extras = (options.alibi_slopes is not None) + 2 * (options.sink_logits is not None)
    return _spec(kv_format, group, dtype, keys, numbers, extras)


# Heads up to 64, 128 and 256 wide, kept as they are and quantized: as large as fits 255 registers of a thread.
_TILES = {
    ("sm_80", 64, False): Tiles(128, 8, 2, 16, 1, 2, keys=32),
    ("sm_80", 64, True): Tiles(128, 8, 2, 16, 1, 2, keys=32),
    ("sm_80", 128, False): Tiles(128, 8, 2, 16, 1, 2, keys=32),
    ("sm_80", 128, True): Tiles(128, 8, 1, 16, 1, 2, keys=16),
    ("sm_80", 256, False): Tiles(32, 4, 2, 32, 4, 2, keys=32),
    ("sm_80", 256, True): Tiles(32, 4, 1, 32, 4, 2, keys=32),
    ("sm_90", 64, False): Tiles(128, 8, 3, 64, 4, 3, keys=64),
    ("sm_90", 64, True): Tiles(128, 8, 3, 64, 4, 3, keys=64),
    ("sm_90", 128, False): Tiles(128, 8, 3, 64, 4, 3, keys=64),
    ("sm_90", 128, True): Tiles(128, 8, 3, 64, 4, 3, keys=32),
    ("sm_90", 256, False): Tiles(64, 8, 2, 64, 8, 2, keys=16),
    ("sm_90", 256, True): Tiles(64, 8, 2, 64, 8, 2, keys=16),
    ("sm_100", 64, False): Tiles(128, 8, 3, 64, 4, 3, keys=32),
    ("sm_100", 64, True): Tiles(128, 8, 3, 64, 4, 3, keys=32),
    ("sm_100", 128, False): Tiles(64, 4, 2, 64, 4, 3, keys=32),
    ("sm_100", 128, True): Tiles(128, 8, 3, 64, 4, 3, keys=32),
    ("sm_100", 256, False): Tiles(64, 8, 2, 64, 8, 2, keys=16),
    ("sm_100", 256, True): Tiles(64, 8, 2, 64, 8, 2, keys=16),
    ("gfx942", 64, False): Tiles(64, 4, 2, 16, 1, 2, keys=32),
    ("gfx942", 64, True): Tiles(64, 4, 2, 16, 1, 2, keys=32),
    ("gfx942", 128, False): Tiles(64, 4, 2, 16, 1, 2, keys=32),
    ("gfx942", 128, True): Tiles(64, 4, 2, 16, 1, 2, keys=32),
    ("gfx942", 256, False): Tiles(64, 4, 2, 16, 1, 2, keys=32),
    ("gfx942", 256, True): Tiles(64, 4, 2, 16, 1, 2, keys=32),
}
# Products in float32 have no tensor cores here: their operands lie in registers.
_FLOAT32_TILES = Tiles(16, 4, 2, 16, 4, 2, keys=32)
# Small, to be quick, and of two heights, so that tests see whether both give the same bits.
_INTERPRETER_TILES = Tiles(64, 1, 1, 16, 1, 1, keys=64)


def tiles_for(arch: str, kv_format: KVFormat, dtype: torch.dtype) -> Tiles:
    """For queries of `dtype` on an architecture of triton_support, or "interpreter"."""
    if arch == "interpreter":
        return _INTERPRETER_TILES
    sides = (kv_format.k, kv_format.v)
    if any(_operand(side, dtype) == torch.float32 for side in sides):
        return _FLOAT32_TILES
    width = max(64, triton.next_power_of_2(kv_format.head_dim))
    return _TILES[arch, width, any(side.code.num_params for side in sides)]


def _operand(side: KVSide, dtype: torch.dtype) -> torch.dtype:
    """What a side becomes for its product. Two floating types meet in float32: neither holds all of the other."""
    return dtype if side.code.num_params or side.code.dtype == dtype else torch.float32
