"""Owns what all Triton kernels share: when they can run, small device functions, and cases to compile without a GPU.
Does not know any op. Imported by triton.py files alone, so that a CPU install needs no triton."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Triton 3.9 warns unless the choice is made; a fused multiply-add is more exact, and what CUDA's libraries do.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def unsupported(device: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...] = ()) -> str | None:
    """The part of `supports` that all Triton kernels share; `dtypes`: other than the three floating ones."""
    allowed = dtypes or (torch.float32, torch.bfloat16, torch.float16)
    if dtype not in allowed:
        return f"it knows {', '.join(map(str, allowed))}, not {dtype}"
    kind = torch.device(device).type
    if INTERPRETED:
        return None if kind == "cpu" else "TRITON_INTERPRET=1 interprets kernels on cpu tensors"
    return None if kind == "cuda" else f"it runs on a GPU (or on cpu under TRITON_INTERPRET=1), not on {device}"


def architecture(device: torch.device) -> str:
    """The key of tile tables for this device: one of ARCHITECTURES, the nearest older one for others."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter: any will do
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


@dataclass(frozen=True, slots=True)
class CompileCase:
    """One specialization of a kernel, as a launch on a GPU would compile it.

    `signature`: Triton type of each argument that is no constexpr ("*bf16", "i32", "fp32"), by name. `aligned`: the
    arguments (pointers, strides) that are multiples of 16, as they are for the shapes in question; None: all pointers.
    `large`: the pointers to tensors of 2 GiB or more (a KV cache), which AMD addresses by other instructions.
    `architectures`: those that would launch it; a case with the tiles of one names that one.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] | None = None
    num_warps: int = 4
    num_stages: int = 3
    uses_dot: bool = False  # then tensor-core instructions must be there
    extra_options: Mapping[str, Any] = field(default_factory=dict)
    large: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ARCHITECTURES


_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """a @ b + acc in float32. Triton 3.9's interpreter multiplies the bit patterns of bfloat16, and its BLAS sums a row
    by its place among the rows: float64 there hides the order."""
    if _INTERPRETED:
        wide_a, wide_b = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
        return tl.dot(wide_a, wide_b, acc.to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to dtype, to nearest even. Triton 3.9's interpreter cuts bfloat16 off instead: rounded by hand there."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, 0x7FC00000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def decode_e4m3(bits):
    """fp8 e4m3 (OCP: no infinity, NaN is 0x7F) in uint8 -> float32, by integer operations: sm_80 has no such type."""
    sign = (bits.to(tl.uint32) & 0x80) << 24
    rest = bits.to(tl.uint32) & 0x7F
    normal = (rest << 20) + (120 << 23)
    subnormal = rest.to(tl.float32) * 0.001953125  # multiples of 2^-9
    magnitude = tl.where(rest < 8, subnormal, normal.to(tl.float32, bitcast=True))
    magnitude = tl.where(rest == 0x7F, float("nan"), magnitude)
    return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def encode_e4m3(x):
    """float32 in [-448, 448] or NaN -> fp8 e4m3 in uint8, to nearest even."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    rest = bits & 0x7FFFFFFF
    rounded = rest + 0x7FFFF + ((rest >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)
    # Below 2^-6 the adder rounds to multiples of 2^-9: 2^14 has that unit in its last place.
    magnitude = rest.to(tl.float32, bitcast=True) + 16384.0
    subnormal = magnitude.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(rest < 0x3C800000, subnormal, normal)
    code = tl.where(rest > 0x7F800000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def size_bits(x):
    """|x| of float32 as integers, in which a maximum does not lose NaN: it is above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def round_even(x):
    """float32 of size below 2^22 -> the nearest integer, the even one of two."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23, whose unit in the last place is 1
