"""Owns the Triton fp8 linear: its kernels, its launch and the cases to compile.
Does not know tiles (triton_gemm.py), nor how codes lie and are decoded (triton_gemm_codes.py) or made (..._rows.py).

Where tensor cores take e4m3 (sm_90, sm_100) and activations are rounded to it, codes meet codes. Elsewhere (sm_80 has
no fp8; gfx942 has another e4m3, with another bias and one zero) both are decoded to bfloat16, which holds them."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from servd_kernels import triton_gemm, triton_gemm_rows
from servd_kernels.coded_linear import BoundLinear
from servd_kernels.linear.packed import ACTIVATIONS
from servd_kernels.linear_fp8.packed import PackedWeight
from servd_kernels.triton_gemm import (
    dot,
    load_columns,
    product,
    program_tile,
    row_pointers,
    scale_tile,
)
from servd_kernels.triton_gemm_codes import (
    E4M3,
    LANES,
    code_pointers,
    decode,
    decodes_pairs,
    is_woven,
    load_codes,
    pack_codes,
)
from servd_kernels.triton_gemm_end import finish_tile, interleave
from servd_kernels.triton_support import ARCHITECTURES, CompileCase, unsupported
from servd_kernels.weight_quant import FP8

HAVE_FP8 = ("sm_90", "sm_100")
WIDTH = 64  # codes in a step of the kernel that decodes, of one row
NAN = 0x7F

_E4M3, _LANES = tl.constexpr(E4M3), tl.constexpr(LANES)


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(codes: torch.Tensor, scales: torch.Tensor, activations: str = "none", gated: bool = False) -> PackedWeight:
    """Runs of codes where they will be decoded; rows of them, each at a multiple of 16 bytes, where codes meet codes.
    The scale of a row that holds a NaN becomes NaN, so that decoding need not know of any."""
    arch = triton_gemm.architecture_of(codes.device)
    return pack_for(arch, codes, scales, activations, gated)


def pack_for(
    arch: str, codes: torch.Tensor, scales: torch.Tensor, activations: str, gated: bool = False
) -> PackedWeight:
    """As `pack`, for an architecture."""
    if gated:
        codes, scales = interleave(codes), interleave(scales)
    rows, columns = codes.shape
    data = codes.contiguous().view(torch.uint8)
    scales = scales.masked_fill((data & NAN).eq(NAN).any(1), torch.nan)
    if _meets_codes(arch, activations):
        data = torch.nn.functional.pad(data, (0, -columns % 16)).view(FP8)
    else:
        data = pack_codes(data, WIDTH, 1, is_woven(arch))
    return PackedWeight(data, scales, rows // 2 if gated else rows, columns, activations, gated, run)


def _meets_codes(arch: str, activations: str) -> bool:
    return activations == "fp8" and arch in HAVE_FP8


@triton.jit(do_not_specialize=["num_rows"])
def _codes_kernel(
    x, weight, x_scales, scales, bias, residual, out, num_rows, num_columns, depth, x_stride, weight_stride,
    residual_stride, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    row, column = program_tile(num_rows, num_columns, ROWS, COLUMNS)
    acc, _ = product(
        x, weight, row, column, num_rows, num_columns, depth, x_stride, weight_stride,
        ROWS, COLUMNS, BLOCK, False, HAS_DESCRIPTORS, IS_EVEN, "ieee",
    )  # fmt: skip
    values = scale_tile(acc.T, x_scales, scales, row, column, num_rows, num_columns, ROWS, COLUMNS)
    finish_tile(
        values, bias, residual, residual_stride, out, row, column, num_rows, num_columns,
        ACTIVATION, IS_GATED, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _decoding_kernel(
    x, weight, x_scales, scales, bias, residual, out, num_rows, num_columns, depth, x_stride, residual_stride,
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    IS_WOVEN: tl.constexpr, FAST: tl.constexpr, IS_EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, column = program_tile(num_rows, num_columns, ROWS, COLUMNS)
    steps = tl.cdiv(depth, BLOCK)
    runs = code_pointers(weight, column, steps, COLUMNS, BLOCK)
    x_rows = row_pointers(x, row, num_rows, x_stride, ROWS, BLOCK)
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    for step in range(steps):
        codes = decode(load_codes(runs + step * (_LANES * BLOCK), IS_WOVEN), x.dtype.element_ty, _E4M3, 0, FAST)
        acc = dot(codes, load_columns(x_rows, step * BLOCK, depth, BLOCK, IS_EVEN).T, acc, PRECISION)
    values = scale_tile(acc.T, x_scales, scales, row, column, num_rows, num_columns, ROWS, COLUMNS)
    finish_tile(
        values, bias, residual, residual_stride, out, row, column, num_rows, num_columns,
        ACTIVATION, IS_GATED, ROWS, COLUMNS,
    )  # fmt: skip


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scales: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or (torch.float32 if x.dtype == FP8 else x.dtype)
    out = torch.empty(len(x), packed.out_features, dtype=out_dtype, device=x.device)
    if out.numel():
        launch(triton_gemm.architecture_of(x.device), x, packed, bias, x_scales, activation, residual, out)
    return out


def launch(
    arch: str,
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    x_scales: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes to out [num_rows, out_features], with the tiles of an architecture, for which the weight was packed."""
    x = triton_gemm.with_unit_columns(x)
    meets_codes = _meets_codes(arch, packed.activations)
    if packed.activations == "fp8" and x_scales is None:
        x, x_scales = triton_gemm_rows.quantize(
            x, triton_gemm_rows.E4M3 if meets_codes else triton_gemm_rows.E4M3_VALUES
        )
        x = x.view(FP8) if meets_codes else x
    elif x.dtype == FP8 and not meets_codes:
        x = x.to(torch.bfloat16)
    if x_scales is not None:
        x_scales = x_scales.contiguous()
    depth, columns = packed.in_features, packed.out_features * (2 if packed.gated else 1)
    tiles = triton_gemm.tiles_for(_table(arch, x.dtype, meets_codes), len(x))
    grid = triton_gemm.grid(tiles, len(x), columns)
    choices: dict[str, Any] = {
        "ACTIVATION": ACTIVATIONS[activation],
        "IS_GATED": packed.gated,
        "residual_stride": 0 if residual is None else residual.stride(0),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        **triton_gemm.options(arch, tiles),
    }
    if not meets_codes:
        _decoding_kernel[grid](
            x, packed.data, x_scales, packed.scales, bias, residual, out, len(x), columns, depth, x.stride(0),
            BLOCK=WIDTH, IS_WOVEN=is_woven(arch), FAST=decodes_pairs(arch), IS_EVEN=depth % WIDTH == 0,
            PRECISION=triton_gemm.precision(arch), **choices,
        )  # fmt: skip
        return
    block = triton_gemm.block_for(arch, FP8)
    weight = packed.data[:, :depth]
    has_descriptors, operands = triton_gemm.operands(arch, tiles, block, x, weight)
    _codes_kernel[grid](
        *operands, x_scales, packed.scales, bias, residual, out, len(x), columns, depth, x.stride(0),
        weight.stride(0), BLOCK=block, HAS_DESCRIPTORS=has_descriptors, IS_EVEN=depth % block == 0, **choices,
    )  # fmt: skip


def _table(arch: str, dtype: torch.dtype, meets_codes: bool) -> triton_gemm.Table:
    if meets_codes:
        return triton_gemm.GROUPED[arch]  # the tensor cores' short sums, and the total that they are added to
    return triton_gemm.FLOAT32[arch] if dtype == torch.float32 else triton_gemm.CODED[arch]


def compile_cases() -> Iterator[CompileCase]:
    """Sizes are arguments: a case stands for all the shapes of Llama-3-8B and of the starter, which fill steps."""
    yield triton_gemm_rows.case("rows to e4m3", triton_gemm_rows.E4M3)
    yield triton_gemm_rows.case("rows to numbers of e4m3", triton_gemm_rows.E4M3_VALUES)
    for arch in ARCHITECTURES:
        for rows in triton_gemm.CODED[arch]:
            yield _case("W8A16", arch, rows, False)
            if arch in HAVE_FP8:
                yield _case("W8A8", arch, rows, True)


def _case(name: str, arch: str, rows: int, meets_codes: bool) -> CompileCase:
    tiles = triton_gemm.tiles_for(_table(arch, torch.bfloat16, meets_codes), rows)
    pointers = {"scales": "*fp32", "residual": "*bf16", "out": "*bf16"}
    constants: dict[str, Any] = (
        dict(triton_gemm.PLAIN_END) | {"IS_GATED": False} | {"ROWS": tiles.rows, "COLUMNS": tiles.columns}
    )
    integers: tuple[str, ...] = ("num_rows", "num_columns", "depth", "x_stride", "residual_stride")
    if meets_codes:
        block = triton_gemm.block_for(arch, FP8)
        pointers |= triton_gemm.operand_types(arch, tiles, block, "*fp8e4nv") | {"x_scales": "*fp32"}
        constants |= {"BLOCK": block, "HAS_DESCRIPTORS": True}
        integers += ("weight_stride",)
    else:
        pointers |= {"x": "*bf16", "weight": "*u8"}
        constants |= {
            "x_scales": None, "BLOCK": WIDTH, "IS_WOVEN": is_woven(arch), "FAST": decodes_pairs(arch),
            "PRECISION": triton_gemm.precision(arch),
        }  # fmt: skip
    return triton_gemm.case(
        f"{name} {triton_gemm.class_name(rows)}", arch, tiles, _codes_kernel if meets_codes else _decoding_kernel,
        pointers, integers, constants,
    )  # fmt: skip
