"""Owns the Triton kernels of the activations, gated or not, rounded or quantized by row; their launch and cases.
Does not know which op calls."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from servd_kernels.activation import LIMITS, as_rows
from servd_kernels.triton_support import (
    POINTERS,
    CompileCase,
    encode_e4m3,
    narrow,
    round_even,
    size_bits,
    unsupported,
)

SILU, GELU_ERF, GELU_TANH = 0, 1, 2
GELU_FORMS = {"none": GELU_ERF, "tanh": GELU_TANH}
_SPAN = 1024  # columns of one program where rows are not quantized

_SILU, _GELU_ERF = tl.constexpr(SILU), tl.constexpr(GELU_ERF)


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return unsupported(device, dtype)


@triton.jit
def _times_sigmoid(x, y):
    """x * sigmoid(y). Beyond the clamp the result is 0 already, and the exponential would overflow."""
    return x / (1.0 + tl.exp(tl.minimum(-y, 88.0)))


@triton.jit
def _activate(x, width, column, mask, KIND: tl.constexpr, IS_GATED: tl.constexpr):
    """float32 values of one row at x."""
    value = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
    if KIND == _SILU:
        result = _times_sigmoid(value, value)
    elif KIND == _GELU_ERF:
        result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    else:
        # 0.5 x (1 + tanh(u)) = x * sigmoid(2u)
        result = _times_sigmoid(value, value * (1.5957691216057308 + 0.07135481283 * value * value))
    if IS_GATED:
        result *= tl.load(x + width + column, mask=mask, other=0.0).to(tl.float32)
    return result


@triton.jit
def _to_floats(x, out, row_stride, width, KIND: tl.constexpr, IS_GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    result = _activate(x + row * row_stride, width, column, mask, KIND, IS_GATED)
    tl.store(out + row * width + column, narrow(result, out.dtype.element_ty), mask=mask)


@triton.jit
def _to_codes(
    x, codes, scales, row_stride, width, limit,
    KIND: tl.constexpr, IS_GATED: tl.constexpr, IS_INT8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    most_bits = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        result = _activate(x + row * row_stride, width, column, column < width, KIND, IS_GATED)
        most_bits = tl.maximum(most_bits, size_bits(result))
    most = tl.max(most_bits, 0).to(tl.float32, bitcast=True)
    tl.store(scales + row, tl.div_rn(most, limit))
    inverse = tl.div_rn(limit, tl.where(most == 0.0, 1.0, most))
    # Computed again, from a row that is in the cache now: a wide one would not fit the registers of one program.
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < width
        ratio = _activate(x + row * row_stride, width, column, mask, KIND, IS_GATED) * inverse
        ratio = tl.where(ratio == ratio, tl.minimum(tl.maximum(ratio, -limit), limit), 0.0)
        if IS_INT8:
            code = round_even(ratio).to(tl.int8).to(tl.uint8, bitcast=True)
        else:
            code = encode_e4m3(ratio)
        tl.store(codes + row * width + column, code, mask=mask)


def _code_tile(width: int) -> tuple[int, int]:
    """(columns, warps) of a program that gives codes."""
    block = min(4096, triton.next_power_of_2(width))
    return block, max(2, block // 512)


def launch(
    x: torch.Tensor, kind: int, is_gated: bool, out_dtype: torch.dtype | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x [..., width] (twice that where gated) -> [..., width], or with out_dtype its (codes, scales)."""
    rows, width = as_rows(x), x.shape[-1] // (2 if is_gated else 1)
    out = torch.empty(*x.shape[:-1], width, dtype=out_dtype or x.dtype, device=x.device)
    if out_dtype is None:
        if out.numel():
            _to_floats[(len(rows), triton.cdiv(width, _SPAN))](
                rows, out, rows.stride(0), width, KIND=kind, IS_GATED=is_gated, BLOCK=_SPAN, num_warps=4
            )
        return out
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if out.numel():
        block, num_warps = _code_tile(width)
        _to_codes[(len(rows),)](
            rows, out.view(torch.uint8), scales, rows.stride(0), width, LIMITS[out_dtype],
            KIND=kind, IS_GATED=is_gated, IS_INT8=out_dtype == torch.int8, BLOCK=block,
            num_warps=num_warps,
        )  # fmt: skip
    return out, scales


def cases(forms: dict[str, int], is_gated: bool) -> Iterator[CompileCase]:
    """Widths of the starter model and of Llama-3-8B, for each form of an op, by its name in the table."""
    pointer = POINTERS[torch.bfloat16]
    for form, kind in forms.items():
        constants = {"KIND": kind, "IS_GATED": is_gated}
        yield CompileCase(
            name=f"any width{form}",
            kernel=_to_floats,
            signature={"x": pointer, "out": pointer, "row_stride": "i32", "width": "i32"},
            constants=constants | {"BLOCK": _SPAN},
            aligned=("x", "out", "row_stride", "width"),
        )
        for width in (1536, 14336):
            for out_dtype in LIMITS:
                block, num_warps = _code_tile(width)
                yield CompileCase(
                    name=f"width {width}{form} to {str(out_dtype).removeprefix('torch.')}",
                    kernel=_to_codes,
                    signature={"x": pointer, "codes": "*u8", "scales": "*fp32"}
                    | {"row_stride": "i32", "width": "i32", "limit": "fp32"},
                    constants=constants | {"IS_INT8": out_dtype == torch.int8, "BLOCK": block},
                    aligned=("x", "codes", "scales", "row_stride", "width"),
                    num_warps=num_warps,
                )
