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
def _largest_magnitude(x):
    """x [rows, dims] -> [rows]. As integers the bits of a magnitude are in order, NaN above all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)


@triton.jit
def _store_int8(x, data, params, row_mask, mask, column):
    most = _largest_magnitude(x)
    scale = tl.div_rn(most, tl.full(most.shape, 127.0, tl.float32)).to(tl.float16)
    numbers = _clamp(_divide(x, scale.to(tl.float32)[:, None]), -127.0, 127.0)
    tl.store(data[:, None] + column[None, :], _round(numbers).to(tl.int32).to(tl.uint8), mask=mask)
    tl.store(params.to(tl.pointer_type(tl.float16)), scale, mask=row_mask)


@triton.jit
def _try_fp8(x, most, limit):
    """Codes [rows, dims], scale [rows] and squared error [rows] with the largest magnitude at `limit`."""
    scale = tl.div_rn(most, tl.full(most.shape, limit, tl.float32)).to(tl.float16)
    wide = scale.to(tl.float32)[:, None]
    codes = encode_e4m3(_clamp(_divide(x, wide), -448.0, 448.0))
    off = decode_e4m3(codes) * wide - x
    return codes, scale, tl.sum(off * off, 1)


@triton.jit
def _store_fp8(x, data, params, row_mask, mask, column):
    most = _largest_magnitude(x)
    codes, scale, least = _try_fp8(x, most, 448.0)
    for i in range(1, 7):  # FP8_LIMITS of kv_format.py, which tells why
        other_codes, other_scale, error = _try_fp8(x, most, 448.0 - 32.0 * i)
        is_better = error < least
        codes = tl.where(is_better[:, None], other_codes, codes)
        scale = tl.where(is_better, other_scale, scale)
        least = tl.where(is_better, error, least)
    tl.store(data[:, None] + column[None, :], codes, mask=mask)
    tl.store(params.to(tl.pointer_type(tl.float16)), scale, mask=row_mask)


@triton.jit
def _try_int4(groups, mean, scale, minimum):
    """groups [rows, groups, GROUP] -> codes, stored scale and minimum, squared error, and the scale and minimum that
    suit the codes best."""
    stored_scale, stored_minimum = scale.to(tl.float16), minimum.to(tl.float16)
    wide, low = stored_scale.to(tl.float32)[:, :, None], stored_minimum.to(tl.float32)[:, :, None]
    codes = _round(_clamp(_divide(groups - low, wide), 0.0, 15.0))
    off = codes * wide + low - groups
    count: tl.constexpr = groups.shape[2]
    average = tl.sum(codes, 2) / count
    centred = codes - average[:, :, None]
    spread = tl.sum(centred * centred, 2)
    next_scale = tl.sum(centred * (groups - mean[:, :, None]), 2) / tl.where(spread > 1e-9, spread, 1e-9)
    return codes, stored_scale, stored_minimum, tl.sum(off * off, 2), next_scale, mean - average * next_scale


@triton.jit
def _store_int4(
    x, data, params, row_mask, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    groups = tl.reshape(x, (ROWS, DIMS // GROUP, GROUP))
    is_nan = tl.max((groups != groups).to(tl.int32), 2) > 0
    low = tl.where(is_nan, float("nan"), tl.min(groups, 2))
    mean = tl.sum(groups, 2) / GROUP
    span = tl.max(groups, 2) - low
    first_scale = tl.div_rn(span, tl.full(span.shape, 15.0, tl.float32))
    codes, scale, minimum, least, next_scale, next_minimum = _try_int4(groups, mean, first_scale, low)
    for _ in range(3):  # FIT_PASSES of kv_format.py
        other, other_scale, other_minimum, error, next_scale, next_minimum = _try_int4(
            groups, mean, next_scale, next_minimum
        )
        is_better = error < least
        codes = tl.where(is_better[:, :, None], other, codes)
        scale = tl.where(is_better, other_scale, scale)
        minimum = tl.where(is_better, other_minimum, minimum)
        least = tl.where(is_better, error, least)
    even, odd = tl.split(tl.reshape(codes.to(tl.int32), (ROWS, DIMS // 2, 2)))
    byte = tl.arange(0, DIMS // 2)
    mask = row_mask[:, None] & (byte < HEAD_DIM // 2)[None, :]
    tl.store(data[:, None] + byte[None, :], (even | (odd << 4)).to(tl.uint8), mask=mask)
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
        _store_int8(x, data, params, row_mask, mask, column)
    else:
        _store_fp8(x, data, params, row_mask, mask, column)


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
