"""Owns the Triton weight-only linear of 4 and 8 bits: its kernels, its launch and the cases to compile.
Does not know tiles (triton_gemm.py), nor how codes lie and are decoded (triton_gemm_codes.py).

Codes less their zero point are small integers, exact in x's dtype: the tensor cores sum them over a group, and the
group's scale multiplies that sum in float32. Groups are added in ascending order."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from servd_kernels import triton_gemm, triton_gemm_rows
from servd_kernels.coded_linear import BoundLinear
from servd_kernels.linear.packed import ACTIVATIONS
from servd_kernels.linear_wna16.packed import GroupedWeight, PackedWeight
from servd_kernels.triton_gemm import dot, load_columns, program_tile, row_pointers
from servd_kernels.triton_gemm_codes import (
    INT4,
    INT8,
    LANES,
    code_pointers,
    decode,
    decode_int8,
    decodes_pairs,
    is_woven,
    load_codes,
    middle,
    pack_codes,
    pack_groups,
    unbias,
)
from servd_kernels.triton_gemm_end import finish_tile, interleave
from servd_kernels.triton_support import ARCHITECTURES, INTERPRETED, POINTERS, CompileCase, unsupported

MAX_WIDTH = 64  # bytes of codes in a step, of one row
MAX_ACTIVATION_GROUP = 256
_WHOLE_ROW = 1 << 30  # stands for every group size that no row exceeds, so that they share one kernel

_INT4 = tl.constexpr(INT4)
_LANES = tl.constexpr(LANES)
_INTERPRETED = tl.constexpr(INTERPRETED)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_X_GROUP = tl.constexpr(MAX_ACTIVATION_GROUP)


@dataclass(frozen=True, slots=True)
class Form:
    """What a group's word holds."""

    scale_dtype: torch.dtype
    is_symmetric: bool
    has_minima: bool


def supports(
    device: str, dtype: torch.dtype, bits: int = 4, group_size: int = 128, in_features: int = 0,
    activations: str = "none", **axes: object,
) -> str | None:  # fmt: skip
    if group_size not in (16, 32, 64, 128) and group_size % 256 and group_size < in_features:
        return f"group_size must be 16, 32, 64, 128, a multiple of 256 or the whole row, not {group_size}"
    if activations == "int8" and group_size == 16 < in_features:
        return "groups of 16 are fewer columns than a GPU's int8 products take: 32"
    return unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def _width(group_size: int, in_features: int) -> int:
    return MAX_WIDTH if group_size >= in_features else min(MAX_WIDTH, group_size)


def pack(weight: GroupedWeight, activations: str = "none", gated: bool = False) -> PackedWeight:
    return pack_for(triton_gemm.architecture_of(weight.codes.device), weight, activations, gated)


def pack_for(arch: str, weight: GroupedWeight, activations: str, gated: bool = False) -> PackedWeight:
    """As `pack`, for an architecture."""
    if gated:
        zeros, minima = (None if t is None else interleave(t) for t in (weight.zeros, weight.minima))
        codes, scales = interleave(weight.codes), interleave(weight.scales)
        weight = GroupedWeight(codes, scales, weight.bits, weight.group_size, zeros, minima)
    rows, columns = weight.codes.shape
    woven = is_woven(arch) and activations == "none"
    codes = pack_codes(weight.codes, _width(weight.group_size, columns), 2 if weight.bits == 4 else 1, woven)
    form = Form(weight.scales.dtype, weight.zeros is None and weight.minima is None, weight.minima is not None)
    return PackedWeight(
        codes, pack_groups(_words(weight)), None, rows // 2 if gated else rows, columns, weight.bits,
        weight.group_size, activations, gated, run, form=form,
    )  # fmt: skip


def _words(weight: GroupedWeight) -> torch.Tensor:
    """A group's scale, and above it in the same word its minimum, as the scale is, or its zero point as an integer:
    int32 for scales of 16 bits, int64 for float32, [out_features, num_groups]. One load brings both, and because the
    product needs the zero point Triton copies the words ahead, as it does codes."""
    word, half = (torch.int64, torch.int32) if weight.scales.dtype == torch.float32 else (torch.int32, torch.int16)
    if weight.minima is not None:
        above = weight.minima.contiguous().view(half)
    elif weight.zeros is not None:
        above = weight.zeros
    else:
        above = torch.full(weight.scales.shape, 1 << weight.bits - 1, device=weight.scales.device)
    size = 8 * half.itemsize
    return weight.scales.contiguous().view(half).to(word) & (1 << size) - 1 | above.to(word) << size


@triton.jit
def _scale(word, SCALE: tl.constexpr):
    """The scales in float32."""
    if SCALE == tl.float32:
        scale = word.to(tl.int32).to(tl.float32, bitcast=True)
    elif SCALE == tl.bfloat16:
        scale = (word << 16).to(tl.float32, bitcast=True)
    else:
        scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale


@triton.jit
def _minimum(word, SCALE: tl.constexpr, CODE: tl.constexpr):
    """The minima in float32, for codes counted from their middle."""
    if SCALE == tl.float32:
        above = _scale(word >> 32, SCALE)
    else:
        above = _scale(word >> 16, SCALE)
    scale = _scale(word, SCALE)
    return tl.fma(scale, tl.full(scale.shape, middle(CODE), tl.float32), above)


@triton.jit
def _zero(word, SCALE: tl.constexpr):
    """The zero points in float32."""
    if SCALE == tl.float32:
        zero = (word >> 32).to(tl.float32)
    else:
        zero = (word >> 16).to(tl.float32)
    return zero


@triton.jit
def _weight(
    codes, word, DTYPE: tl.constexpr, SCALE: tl.constexpr, HAS_MINIMA: tl.constexpr,
    CODE: tl.constexpr, HALF: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Codes less their group's zero points; less the middle of their range where there are minima."""
    weight = decode(codes, DTYPE, CODE, HALF, FAST)
    if HAS_MINIMA:
        shift = tl.full([codes.shape[0], 1], unbias(DTYPE, CODE, FAST) - middle(CODE), tl.float32)
    else:
        shift = (unbias(DTYPE, CODE, FAST) - _zero(word, SCALE))[:, None]
    if _INTERPRETED:  # it would add the bit patterns of bfloat16
        weight = (weight.to(tl.float32) + shift).to(DTYPE)
    else:
        weight += shift.to(DTYPE)
    return weight


@triton.jit
def _add_group(total, part, sums, word, SCALE: tl.constexpr, HAS_MINIMA: tl.constexpr, CODE: tl.constexpr):
    """total + a group's scale * its part, + its minimum * its sums of x where there are minima; [COLUMNS, ROWS]."""
    total = tl.fma(part, _scale(word, SCALE)[:, None], total)
    if HAS_MINIMA:
        total = tl.fma(sums, _minimum(word, SCALE, CODE)[:, None], total)
    return total


@triton.jit
def _sums(tokens, acc, HAS_MINIMA: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + the sum of each token's columns, in every row: by the tensor cores, whose order no tile changes."""
    if HAS_MINIMA:
        acc = dot(tl.full([COLUMNS, tokens.shape[0]], 1.0, tokens.dtype), tokens, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(
    x, codes, words, bias, residual, out, num_rows, num_columns, depth, x_stride, residual_stride,
    CODE: tl.constexpr, WIDTH: tl.constexpr, GROUP_SIZE: tl.constexpr, SCALE: tl.constexpr, HAS_MINIMA: tl.constexpr,
    IS_WOVEN: tl.constexpr, FAST: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step is WIDTH bytes of each row: of 4-bit codes 2 * WIDTH columns, of one group or of two."""
    STEP: tl.constexpr = 2 * WIDTH if CODE == _INT4 else WIDTH
    IS_SPLIT: tl.constexpr = GROUP_SIZE < STEP
    DTYPE: tl.constexpr = x.dtype.element_ty
    row, column = program_tile(num_rows, num_columns, ROWS, COLUMNS)
    steps = tl.cdiv(depth, STEP)
    runs = code_pointers(codes, column, steps, COLUMNS, WIDTH)
    x_rows = row_pointers(x, row, num_rows, x_stride, ROWS, WIDTH)
    words += column + tl.arange(0, COLUMNS)
    lanes = tl.cdiv(num_columns, _LANES) * _LANES
    empty = tl.zeros([COLUMNS, ROWS], tl.float32)
    total = empty
    for step in range(steps):
        start = step * STEP
        word = tl.load(words + start // GROUP_SIZE * lanes)
        code = load_codes(runs + step * (_LANES * WIDTH), IS_WOVEN)
        tokens = load_columns(x_rows, start, depth, WIDTH, IS_EVEN).T
        part = dot(_weight(code, word, DTYPE, SCALE, HAS_MINIMA, CODE, 0, FAST), tokens, empty, PRECISION)
        sums = _sums(tokens, empty, HAS_MINIMA, COLUMNS, PRECISION)
        if CODE == _INT4:
            tokens = load_columns(x_rows, start + WIDTH, depth, WIDTH, IS_EVEN).T
            if IS_SPLIT:
                total = _add_group(total, part, sums, word, SCALE, HAS_MINIMA, CODE)
                part, sums = empty, empty
                word = tl.load(words + (start // GROUP_SIZE + 1) * lanes)
            part = dot(_weight(code, word, DTYPE, SCALE, HAS_MINIMA, CODE, 1, FAST), tokens, part, PRECISION)
            sums = _sums(tokens, sums, HAS_MINIMA, COLUMNS, PRECISION)
        total = _add_group(total, part, sums, word, SCALE, HAS_MINIMA, CODE)
    finish_tile(
        total.T, bias, residual, residual_stride, out, row, column, num_rows, num_columns,
        ACTIVATION, IS_GATED, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _add_int8(
    total, codes, tokens, word, x_scale, IS_SYMMETRIC: tl.constexpr, SCALE: tl.constexpr, HAS_MINIMA: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """total + codes [COLUMNS, WIDTH] int8 @ tokens [WIDTH, ROWS] int8, in the numbers that both stand for."""
    scale = _scale(word, SCALE)
    part = dot(codes, tokens, tl.zeros(total.shape, tl.int32), "ieee").to(tl.float32) * scale[:, None]
    if not IS_SYMMETRIC:
        # weight = code * scale + offset, the code counted from the middle; sums of integers are exact
        if HAS_MINIMA:
            offset = _minimum(word, SCALE, CODE)
        else:
            offset = (middle(CODE) - _zero(word, SCALE)) * scale
        sums = tl.sum(tokens.to(tl.int32), 0).to(tl.float32)
        part += offset[:, None] * sums[None, :]
    return total + part * x_scale[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _int8_kernel(
    x, codes, x_scales, words, bias, residual, out, num_rows, num_columns, depth, x_stride, x_groups, residual_stride,
    CODE: tl.constexpr, WIDTH: tl.constexpr, GROUP_SIZE: tl.constexpr, SCALE: tl.constexpr, HAS_MINIMA: tl.constexpr,
    IS_SYMMETRIC: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """As _kernel, over x in int8 with scales [num_rows, x_groups] of the groups, or of 256 columns of longer ones."""
    STEP: tl.constexpr = 2 * WIDTH if CODE == _INT4 else WIDTH
    IS_SPLIT: tl.constexpr = GROUP_SIZE < STEP
    X_GROUP: tl.constexpr = GROUP_SIZE if GROUP_SIZE < _X_GROUP else _X_GROUP
    row, column = program_tile(num_rows, num_columns, ROWS, COLUMNS)
    steps = tl.cdiv(depth, STEP)
    runs = code_pointers(codes, column, steps, COLUMNS, WIDTH)
    x_rows = row_pointers(x, row, num_rows, x_stride, ROWS, WIDTH)
    words += column + tl.arange(0, COLUMNS)
    lanes = tl.cdiv(num_columns, _LANES) * _LANES
    x_scales += tl.minimum(row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64) * x_groups
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for step in range(steps):
        start = step * STEP
        code = load_codes(runs + step * (_LANES * WIDTH), False)
        word = tl.load(words + start // GROUP_SIZE * lanes)
        x_scale = tl.load(x_scales + start // X_GROUP)
        tokens = load_columns(x_rows, start, depth, WIDTH, IS_EVEN).T
        total = _add_int8(
            total, decode_int8(code, CODE, 0), tokens, word, x_scale, IS_SYMMETRIC, SCALE, HAS_MINIMA, CODE
        )
        if CODE == _INT4:
            tokens = load_columns(x_rows, start + WIDTH, depth, WIDTH, IS_EVEN).T
            if IS_SPLIT:
                word = tl.load(words + (start // GROUP_SIZE + 1) * lanes)
                x_scale = tl.load(x_scales + tl.minimum(start // X_GROUP + 1, x_groups - 1))
            total = _add_int8(
                total, decode_int8(code, CODE, 1), tokens, word, x_scale, IS_SYMMETRIC, SCALE, HAS_MINIMA, CODE
            )
    finish_tile(
        total.T, bias, residual, residual_stride, out, row, column, num_rows, num_columns,
        ACTIVATION, IS_GATED, ROWS, COLUMNS,
    )  # fmt: skip


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty(len(x), packed.out_features, dtype=out_dtype or x.dtype, device=x.device)
    if out.numel():
        launch(triton_gemm.architecture_of(x.device), x, packed, bias, activation, residual, out)
    return out


def launch(
    arch: str,
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes to out [num_rows, out_features], with the tiles of an architecture."""
    x = triton_gemm.with_unit_columns(x)
    form = packed.form
    assert isinstance(form, Form), "the weight was packed by another backend"
    tiles = triton_gemm.tiles_for(_table(arch, x.dtype, packed.activations, form.has_minima), len(x))
    choices = _choices(packed.bits, packed.group_size, packed.in_features, form) | {
        "ACTIVATION": ACTIVATIONS[activation],
        "IS_GATED": packed.gated,
        "residual_stride": 0 if residual is None else residual.stride(0),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        **triton_gemm.options(arch, tiles),
    }
    columns = packed.out_features * (2 if packed.gated else 1)
    grid = triton_gemm.grid(tiles, len(x), columns)
    sizes = (len(x), columns, packed.in_features)
    if packed.activations == "int8":
        x_width = min(packed.group_size, MAX_ACTIVATION_GROUP)
        x_group = None if x_width >= packed.in_features else x_width
        x, x_scales = triton_gemm_rows.quantize(x, triton_gemm_rows.INT8, x_group)
        _int8_kernel[grid](
            x, packed.data, x_scales, packed.scales, bias, residual, out, *sizes, x.stride(0),
            x_scales.numel() // len(x), IS_SYMMETRIC=form.is_symmetric, **choices,
        )  # fmt: skip
        return
    _kernel[grid](
        x, packed.data, packed.scales, bias, residual, out, *sizes, x.stride(0),
        IS_WOVEN=is_woven(arch), FAST=decodes_pairs(arch), PRECISION=triton_gemm.precision(arch), **choices,
    )  # fmt: skip


def _choices(bits: int, group_size: int, in_features: int, form: Form) -> dict[str, Any]:
    """The constants of a kernel that follow from the weight."""
    width = _width(group_size, in_features)
    step = width * (2 if bits == 4 else 1)
    return {
        "CODE": INT4 if bits == 4 else INT8,
        "WIDTH": width,
        "GROUP_SIZE": group_size if group_size < in_features else _WHOLE_ROW,
        "SCALE": _TYPES[form.scale_dtype],
        "HAS_MINIMA": form.has_minima,
        "IS_EVEN": in_features % step == 0,
    }


def _table(arch: str, dtype: torch.dtype, activations: str, has_minima: bool) -> triton_gemm.Table:
    if activations == "none" and dtype == torch.float32:
        return triton_gemm.FLOAT32[arch]
    return (triton_gemm.SUMMED if activations == "int8" or has_minima else triton_gemm.CODED)[arch]


def compile_cases() -> Iterator[CompileCase]:
    """Sizes are arguments: a case stands for all the shapes of Llama-3-8B and of the starter, which fill steps."""
    half = torch.float16
    for arch in ARCHITECTURES:
        for bits, group, name, form in (
            (4, 128, "zeros or none", Form(half, False, False)),
            (4, 32, "zeros or none", Form(half, False, False)),
            (4, 64, "minima", Form(half, False, True)),
            (8, 128, "zeros or none", Form(half, False, False)),
        ):
            for rows in triton_gemm.CODED[arch]:
                yield _case(f"W{bits}A16 groups of {group} {name}", arch, rows, bits, group, form, "none")
        for rows in triton_gemm.SUMMED[arch]:
            for gated in (False, True):
                name = f"W4A8 groups of 128 zeros{' gated' if gated else ''}"
                yield _case(name, arch, rows, 4, 128, Form(half, False, False), "int8", gated)


def _case(
    name: str, arch: str, rows: int, bits: int, group: int, form: Form, activations: str, gated: bool = False
) -> CompileCase:
    tiles = triton_gemm.tiles_for(_table(arch, torch.bfloat16, activations, form.has_minima), rows)
    is_int8 = activations == "int8"
    pointer = POINTERS[torch.bfloat16]
    pointers = {
        "x": "*i8" if is_int8 else pointer,
        "codes": "*u8",
        "words": "*i32",
        "residual": pointer,
        "out": pointer,
    }
    constants = _choices(bits, group, 4096, form) | dict(triton_gemm.PLAIN_END)
    constants |= {"IS_GATED": gated, "ROWS": tiles.rows, "COLUMNS": tiles.columns}
    integers: tuple[str, ...] = ("num_rows", "num_columns", "depth", "x_stride", "residual_stride")
    if is_int8:
        pointers["x_scales"] = "*fp32"
        integers += ("x_groups",)
        constants["IS_SYMMETRIC"] = form.is_symmetric
    else:
        constants |= {"IS_WOVEN": is_woven(arch), "FAST": decodes_pairs(arch), "PRECISION": triton_gemm.precision(arch)}
    return triton_gemm.case(
        f"{name} {triton_gemm.class_name(rows)}", arch, tiles, _int8_kernel if is_int8 else _kernel, pointers,
        integers, constants,
    )  # fmt: skip
