"""Owns how Triton kernels read and write rows of the paged cache: kv_format.py's codes on tiles [rows, dimensions].
Does not know rotary embedding, attention, or how slots were assigned. Keys lie in rows, not in words."""

from __future__ import annotations

import triton
import triton.language as tl

from servd_kernels.triton_support import decode_e4m3, encode_e4m3, narrow


@triton.jit
def swap(x, STEP: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """x [ROWS, DIMS] with dimension i taken from i ^ STEP, a power of two. Not by tl.gather: that shuffles every
    register past every lane, where a split and a join exchange one bit of the layout."""
    pairs = tl.permute(tl.reshape(x, (ROWS, DIMS // (2 * STEP), 2, STEP)), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(second, first), (0, 1, 3, 2)), (ROWS, DIMS))


@triton.jit
def hadamard(x, column, WIDTH: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """x [ROWS, DIMS], transformed in blocks of WIDTH dims; SCALE is WIDTH ** -0.5; column [DIMS] counts from 0."""
    for i in tl.static_range(10):
        if (1 << i) < WIDTH:
            # The lower of a pair becomes first + second, the upper first - second.
            is_upper = (column & (1 << i)) != 0
            x = swap(x, 1 << i, ROWS, DIMS) + tl.where(is_upper[None, :], -x, x)
    return x * SCALE


@triton.jit
def _divide(x, scale):
    """x / scale, exactly rounded; zero where the scale is: then x is too small for float16 to tell."""
    is_zero = scale == 0.0
    return tl.where(is_zero, 0.0, tl.div_rn(x, tl.broadcast_to(tl.where(is_zero, 1.0, scale), x.shape)))


@triton.jit
def _clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    x = tl.where(x < LOW, LOW, x)
    return tl.where(x > HIGH, HIGH, x)  # NaN stays


@triton.jit
def _round(x):
    """To the nearest even integer, for |x| < 2^22; NaN becomes 0."""
    return tl.where(x == x, (x + 12582912.0) - 12582912.0, 0.0)


@triton.jit
def _store_plain(x, pointers, mask, HEAD_DIM: tl.constexpr, column, dtype: tl.constexpr):
    tl.store(pointers.to(tl.pointer_type(dtype))[:, None] + column[None, :], narrow(x, dtype), mask=mask)


@triton.jit
def _store_scaled(x, data, params, row_mask, mask, column, LIMIT: tl.constexpr, IS_FP8: tl.constexpr):
    # As integers the bits of a magnitude are in order, NaN above all.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    most = tl.max(bits, 1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(most, tl.full(most.shape, LIMIT, tl.float32)).to(tl.float16)
    numbers = _clamp(_divide(x, scale.to(tl.float32)[:, None]), -LIMIT, LIMIT)
    if IS_FP8:
        codes = encode_e4m3(numbers)
    else:
        codes = _round(numbers).to(tl.int32).to(tl.uint8)
    tl.store(data[:, None] + column[None, :], codes, mask=mask)
    tl.store(params.to(tl.pointer_type(tl.float16)), scale, mask=row_mask)


@triton.jit
def _store_int4(
    x, data, params, row_mask, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    groups = tl.reshape(x, (ROWS, DIMS // GROUP, GROUP))
    is_nan = tl.max((groups != groups).to(tl.int32), 2) > 0
    least = tl.where(is_nan, float("nan"), tl.min(groups, 2))
    most = tl.max(groups, 2)
    scale = tl.div_rn(most - least, tl.full(most.shape, 15.0, tl.float32)).to(tl.float16)
    minimum = least.to(tl.float16)
    shifted = groups - minimum.to(tl.float32)[:, :, None]
    numbers = _round(_clamp(_divide(shifted, scale.to(tl.float32)[:, :, None]), 0.0, 15.0)).to(tl.int32)
    low, high = tl.split(tl.reshape(numbers, (ROWS, DIMS // 2, 2)))
    byte = tl.arange(0, DIMS // 2)
    mask = row_mask[:, None] & (byte < HEAD_DIM // 2)[None, :]
    tl.store(data[:, None] + byte[None, :], (low | (high << 4)).to(tl.uint8), mask=mask)
    group = tl.arange(0, DIMS // GROUP)
    places = params.to(tl.pointer_type(tl.float16))[:, None] + group[None, :] * (2 * BLOCK_SIZE)
    mask = row_mask[:, None] & (group < HEAD_DIM // GROUP)[None, :]
    tl.store(places, scale, mask=mask)
    tl.store(places + BLOCK_SIZE, minimum, mask=mask)


@triton.jit
def store_rows(
    x, data, params, row_mask, mask, column, CODE: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Encodes x [ROWS, DIMS] float32 (zero from HEAD_DIM on) and stores it. data, params [ROWS]: uint8 pointers to each
    row's codes and to its first parameter; row_mask [ROWS]; mask [ROWS, DIMS]: row_mask and column < HEAD_DIM."""
    if CODE == "float32":
        _store_plain(x, data, mask, HEAD_DIM, column, tl.float32)
    elif CODE == "bfloat16":
        _store_plain(x, data, mask, HEAD_DIM, column, tl.bfloat16)
    elif CODE == "float16":
        _store_plain(x, data, mask, HEAD_DIM, column, tl.float16)
    elif CODE == "int4":
        _store_int4(x, data, params, row_mask, HEAD_DIM, DIMS, ROWS, GROUP, BLOCK_SIZE)
    elif CODE == "int8":
        _store_scaled(x, data, params, row_mask, mask, column, 127.0, False)
    else:
        _store_scaled(x, data, params, row_mask, mask, column, 448.0, True)


@triton.jit
def load_rows(
    data, params, mask, column, CODE: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """What store_rows stored -> float32 [rows, dims], zero where mask is not set."""
    if CODE == "float32":
        return tl.load(data.to(tl.pointer_type(tl.float32))[:, None] + column[None, :], mask=mask, other=0.0)
    if CODE == "bfloat16":
        x = tl.load(data.to(tl.pointer_type(tl.bfloat16))[:, None] + column[None, :], mask=mask, other=0.0)
        return x.to(tl.float32)
    if CODE == "float16":
        x = tl.load(data.to(tl.pointer_type(tl.float16))[:, None] + column[None, :], mask=mask, other=0.0)
        return x.to(tl.float32)
    if CODE == "int4":
        byte = tl.load(data[:, None] + (column // 2)[None, :], mask=mask, other=0).to(tl.int32)
        numbers = ((byte >> ((column % 2) * 4)[None, :]) & 15).to(tl.float32)
        places = params.to(tl.pointer_type(tl.float16))[:, None] + (column // GROUP * (2 * BLOCK_SIZE))[None, :]
        scale = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        minimum = tl.load(places + BLOCK_SIZE, mask=mask, other=0.0).to(tl.float32)
        return numbers * scale + minimum
    codes = tl.load(data[:, None] + column[None, :], mask=mask, other=0)
    if CODE == "int8":
        numbers = codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        numbers = decode_e4m3(codes)
    places = tl.broadcast_to(params.to(tl.pointer_type(tl.float16))[:, None], mask.shape)
    return numbers * tl.load(places, mask=mask, other=0.0).to(tl.float32)
