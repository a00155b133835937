"""Owns the Triton device functions that find the keys of a tile in the paged cache and decode their codes.
Does not know softmax, nor which keys a row sees beyond what it is told to load."""

import triton
import triton.language as tl

from servd_kernels.triton_support import INTERPRETED, narrow

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def convert(x, dtype: tl.constexpr):
    """Numbers to dtype; the interpreter of Triton 3.9 would convert integers to the bits of a bfloat16."""
    if _INTERPRETED:
        x = narrow(x.to(tl.float32), dtype)
    return x.to(dtype)


@triton.jit
def locate(table, pages, index, is_wanted, SPEC: tl.constexpr, HAS_PAGES: tl.constexpr, MASKED: tl.constexpr):
    """Where keys `index` [KEYS] lie: positions in the request, blocks, places in the block, and whether they
    are wanted still. With pages, `index` counts the keys of the chosen pages, one after the other."""
    place = (index.to(tl.uint32) % SPEC.block_size).to(tl.int32)
    column = (index.to(tl.uint32) // SPEC.block_size).to(tl.int32)
    position = index
    if HAS_PAGES:
        column = tl.load(pages + column, mask=is_wanted, other=-1)
        is_wanted = is_wanted & (column >= 0)
        position = column * SPEC.block_size + place
    if MASKED:
        block = tl.load(table + column, mask=is_wanted, other=0)
    else:
        block = tl.load(table + column)
    return position, block, place, is_wanted


@triton.jit
def load_side(
    codes, params, block, place, kv_head, is_wanted, SPEC: tl.constexpr, SIDE: tl.constexpr, MASKED: tl.constexpr
):
    """One side of a tile, [KEYS, WIDTH] in SIDE.operand, and the factor of each key [KEYS], float32, 1 if there is
    none. Zero where not wanted, and beyond the head."""
    numbers = _load_codes(codes, block, place, kv_head, is_wanted, SPEC, SIDE, MASKED)
    param = params + block.to(tl.int64) * SPEC.params_block + kv_head * SPEC.params_head + SIDE.params_offset + place
    factor = tl.full(place.shape, 1.0, tl.float32)
    if SIDE.group > 0:
        numbers = _dequantize_groups(numbers, param, is_wanted, SPEC, SIDE, MASKED)
    elif SIDE.is_scaled:
        if MASKED:
            factor = tl.load(param, mask=is_wanted, other=0.0).to(tl.float32)
        else:
            factor = tl.load(param).to(tl.float32)
        # An infinite scale marks a group that held infinity: all of it is NaN, and not zero times infinity for some.
        factor = tl.where(tl.abs(factor) < float("inf"), factor, float("nan"))
        if SIDE.is_fp8:
            numbers = _widen_e4m3(numbers)
    return convert(numbers, SIDE.operand), factor


@triton.jit
def find_spoiled(codes, params, block, place, kv_head, is_wanted, SPEC: tl.constexpr, SIDE: tl.constexpr):
    """Which keys hold anything but finite numbers on this side: [KEYS] int32, 0 where not wanted. Reads the rows, or
    the parameters if there are any, once more: to look at the tile that `load_side` gives would cost registers."""
    param = params + block.to(tl.int64) * SPEC.params_block + kv_head * SPEC.params_head + SIDE.params_offset + place
    if SIDE.is_scaled:
        return _is_not_finite(tl.load(param, mask=is_wanted, other=0.0))
    elif SIDE.group > 0:
        number = tl.arange(0, 2 * SPEC.width // SIDE.group)  # scales and minima
        mask = (number < 2 * SIDE.num_groups)[None, :] & is_wanted[:, None]
        found = tl.load(param[:, None] + (SPEC.block_size * number)[None, :], mask=mask, other=0.0)
        return tl.max(_is_not_finite(found), 1)
    else:
        codes += kv_head * SIDE.head_stride + SIDE.offset
        row = codes + block.to(tl.int64) * SIDE.block_stride + place * SIDE.row
        spoiled = tl.zeros(place.shape, tl.int32)
        for first in tl.range(0, SIDE.row, 32, num_stages=1):
            column = first + tl.arange(0, 32)
            mask = (column < SIDE.row)[None, :] & is_wanted[:, None]
            found = tl.load(row[:, None] + column[None, :], mask=mask, other=0.0)
            spoiled = spoiled | tl.max(_is_not_finite(found), 1)
        return spoiled


@triton.jit
def _is_not_finite(x):
    """By the bits: all of the exponent set."""
    if x.dtype == tl.float32:
        return ((x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
    elif x.dtype == tl.bfloat16:
        return ((x.to(tl.int16, bitcast=True) & 0x7F80) == 0x7F80).to(tl.int32)
    else:
        return ((x.to(tl.int16, bitcast=True) & 0x7C00) == 0x7C00).to(tl.int32)


@triton.jit
def _load_codes(codes, block, place, kv_head, is_wanted, SPEC: tl.constexpr, SIDE: tl.constexpr, MASKED: tl.constexpr):
    """[KEYS, WIDTH], nibbles taken apart."""
    COLUMNS: tl.constexpr = SPEC.width // 2 if SIDE.bits == 4 else SPEC.width
    codes += kv_head * SIDE.head_stride + SIDE.offset
    row = block.to(tl.int64) * SIDE.block_stride + place * SIDE.row
    column = tl.arange(0, COLUMNS)
    pointers = codes + row[:, None] + column[None, :]
    if SIDE.row < COLUMNS:
        numbers = tl.load(pointers, mask=(column < SIDE.row)[None, :] & is_wanted[:, None], other=0)
    elif MASKED:
        numbers = tl.load(pointers, mask=is_wanted[:, None], other=0)
    else:
        numbers = tl.load(pointers)
    if SIDE.bits == 4:
        numbers = tl.interleave(numbers & 15, numbers >> 4)
    return numbers


@triton.jit
def _widen_e4m3(bits):
    """fp8 e4m3 in uint8 to float32, but for NaN, which `encode` makes only beside a scale that is NaN or infinite."""
    sign = (bits.to(tl.uint32) & 0x80) << 24
    rest = (bits.to(tl.uint32) & 0x7F) << 20
    # The exponent's bias is 7 there and 127 here; the product is exact for subnormals too.
    return (sign | rest).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _dequantize_groups(numbers, param, is_wanted, SPEC: tl.constexpr, SIDE: tl.constexpr, MASKED: tl.constexpr):
    """Nibbles [KEYS, WIDTH] to number * scale + minimum of their group, float32. param [KEYS]: the first scales."""
    GROUPS: tl.constexpr = SPEC.width // SIDE.group
    group = tl.arange(0, GROUPS)
    scales = param[:, None] + (2 * SPEC.block_size * group)[None, :]
    minima = scales + SPEC.block_size
    if MASKED or SIDE.num_groups < GROUPS:
        mask = (group < SIDE.num_groups)[None, :] & is_wanted[:, None]
        scale = tl.load(scales, mask=mask, other=0.0)
        minimum = tl.load(minima, mask=mask, other=0.0)
    else:
        scale = tl.load(scales)
        minimum = tl.load(minima)
    # 2^23 + n as float32 has n in its last bits: cheaper than a conversion, of which a GPU does few a cycle.
    wide = (numbers.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return tl.fma(wide, _spread(scale, SIDE.group), _spread(minimum, SIDE.group))


@triton.jit
def _spread(x, GROUP: tl.constexpr):
    """[KEYS, GROUPS] to float32 [KEYS, GROUPS * GROUP], each number GROUP times."""
    wide = tl.broadcast_to(x.to(tl.float32)[:, :, None], [x.shape[0], x.shape[1], GROUP])
    return tl.reshape(wide, [x.shape[0], x.shape[1] * GROUP])
