"""Owns the Triton kernel that rounds rows of activations to int8 or e4m3 in front of a linear, and its launch.
Does not know the linear."""

from typing import Any

import torch
import triton
import triton.language as tl

from servd_kernels.triton_support import POINTERS, CompileCase, decode_e4m3, encode_e4m3, round_even, size_bits
from servd_kernels.weight_quant import FP8_MAX, group_count

_ALIGNMENT = 16  # bytes: rows of codes start at multiples, for TMA and for cp.async
_SPAN = 2048  # columns that a program holds at a time

INT8, E4M3, E4M3_VALUES = 0, 1, 2  # what is written: codes, codes as uint8, or the numbers they stand for
_LIMITS = {INT8: 127.0, E4M3: FP8_MAX, E4M3_VALUES: FP8_MAX}
_DTYPES = {INT8: torch.int8, E4M3: torch.uint8, E4M3_VALUES: torch.bfloat16}
_INT8, _E4M3 = tl.constexpr(INT8), tl.constexpr(E4M3)


@triton.jit
def _write(values, scale, codes, limit, mask, KIND: tl.constexpr):
    """scale: [1], or [GROUPS, 1]. Where it is 0 or not finite, the codes are 0."""
    is_usable = (scale > 0.0) & (scale < float("inf"))
    divisor = tl.where(is_usable, scale, 1.0)
    if KIND == _INT8:  # by the inverse, as quantize_int8 does
        ratio = values * tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    else:
        ratio = tl.div_rn(values, tl.broadcast_to(divisor, values.shape))
    ratio = tl.where(is_usable & (ratio == ratio), tl.minimum(tl.maximum(ratio, -limit), limit), 0.0)
    if KIND == _INT8:
        code = round_even(ratio).to(tl.int8)
    elif KIND == _E4M3:
        code = encode_e4m3(ratio)
    else:
        code = decode_e4m3(encode_e4m3(ratio)).to(codes.dtype.element_ty)
    tl.store(codes, code, mask=mask)


@triton.jit
def _butterfly(values, STRIDE: tl.constexpr):
    """values [N]: sums and differences of what lies STRIDE apart."""
    SIZE: tl.constexpr = values.shape[0]
    pairs = tl.permute(tl.reshape(values, [SIZE // (2 * STRIDE), 2, STRIDE]), [0, 2, 1])
    low, high = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(low + high, low - high), [0, 2, 1]), [SIZE])


@triton.jit
def _rotated(values, STAGES: tl.constexpr, NORM: tl.constexpr):
    """values [N] as weight_quant.rotate has them, in blocks of 2**STAGES; none if that is 1."""
    if STAGES > 0:
        for stage in tl.static_range(STAGES):
            values = _butterfly(values, 1 << stage)
        values *= NORM
    return values


@triton.jit
def _rows_kernel(
    x, codes, scales, x_stride, codes_stride, depth, limit,
    KIND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid [rows]. The row is read twice, the second time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.int32)
    for start in range(0, depth, BLOCK):
        values = tl.load(x + row * x_stride + start + column, mask=start + column < depth, other=0.0).to(tl.float32)
        most = tl.maximum(most, size_bits(_rotated(values, STAGES, NORM)))
    most = tl.max(most, 0, keep_dims=True).to(tl.float32, bitcast=True)
    scale = tl.div_rn(most, tl.full([1], limit, tl.float32))
    tl.store(scales + row + tl.arange(0, 1), scale)
    for start in range(0, depth, BLOCK):
        mask = start + column < depth
        values = tl.load(x + row * x_stride + start + column, mask=mask, other=0.0).to(tl.float32)
        values = _rotated(values, STAGES, NORM)
        _write(values, scale, codes + row * codes_stride + start + column, limit, mask, KIND)


@triton.jit
def _groups_kernel(
    x, codes, scales, x_stride, codes_stride, depth, limit,
    KIND: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid [rows, spans of GROUPS groups of WIDTH columns]."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = column < depth
    values = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    values = tl.reshape(_rotated(tl.reshape(values, [GROUPS * WIDTH]), STAGES, NORM), [GROUPS, WIDTH])
    scale = tl.div_rn(tl.max(size_bits(values), 1).to(tl.float32, bitcast=True), tl.full([GROUPS], limit, tl.float32))
    num_groups = (depth + WIDTH - 1) // WIDTH
    tl.store(scales + row * num_groups + group, scale, mask=group < num_groups)
    places = codes + row * codes_stride + column
    _write(values, scale[:, None], places, limit, mask, KIND)


def quantize(
    x: torch.Tensor, kind: int, group_size: int | None = None, rotation: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [num_rows, depth], columns one apart -> codes of that shape, rows at multiples of 16 bytes, and scales float32
    [num_rows], or [num_rows, num_groups]. As weight_quant.quantize_int8 and quantize_fp8. group_size: a power of 2.
    rotation: as weight_quant.rotate, first."""
    num_rows, depth = x.shape
    dtype = _DTYPES[kind]
    step = _ALIGNMENT // dtype.itemsize
    codes = torch.empty(num_rows, -(-depth // step) * step, dtype=dtype, device=x.device)
    groups = group_count(depth, group_size) if group_size else 1
    scales = torch.empty(num_rows, groups, dtype=torch.float32, device=x.device)
    common = (x, codes, scales, x.stride(0), codes.stride(0), depth, _LIMITS[kind])
    rotated = _rotation(rotation)
    if group_size and scales.numel():
        count = _SPAN // group_size
        _groups_kernel[(num_rows, triton.cdiv(groups, count))](
            *common, KIND=kind, WIDTH=group_size, GROUPS=count, **rotated
        )
    elif num_rows and not group_size:
        _rows_kernel[(num_rows,)](*common, KIND=kind, BLOCK=_SPAN, **rotated)
    return codes[:, :depth], scales if group_size else scales.squeeze(1)


def _rotation(size: int | None) -> dict[str, Any]:
    return {"STAGES": (size or 1).bit_length() - 1, "NORM": (size or 1) ** -0.5}


def case(name: str, kind: int, group_size: int | None = None, rotation: int | None = None) -> CompileCase:
    """A case to compile, of bfloat16 rows."""
    constants: dict[str, Any] = {"KIND": kind, **_rotation(rotation)}
    constants |= {"WIDTH": group_size, "GROUPS": _SPAN // group_size} if group_size else {"BLOCK": _SPAN}
    integers = ("x_stride", "codes_stride", "depth")
    return CompileCase(
        name=name,
        kernel=_groups_kernel if group_size else _rows_kernel,
        signature={"x": "*bf16", "codes": POINTERS[_DTYPES[kind]], "scales": "*fp32", "limit": "fp32"}
        | dict.fromkeys(integers, "i32"),
        constants=constants,
        aligned=("x", "codes", "scales", *integers),
    )
