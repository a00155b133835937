"""Owns products with weights of 4 and 8 bit codes in Triton: their layout in memory, and their decoding in registers.
Does not know groups of columns, scales, nor any op.

A program reads its tile of codes as one run of bytes. A byte of 4-bit codes holds a column and the one `width` further
on: both halves of a step come from the same registers, and no lane needs what another one loaded."""

import torch
import triton
import triton.language as tl
from torch.nn import functional

from servd_kernels.triton_support import INTERPRETED, decode_e4m3

LANES = 64  # rows of a weight in one run
INT4, INT8, E4M3 = 0, 1, 2

_LANES = tl.constexpr(LANES)
_INT4, _INT8, _E4M3 = tl.constexpr(INT4), tl.constexpr(INT8), tl.constexpr(E4M3)

# NVIDIA's instructions for four codes in one register ($2) to two pairs ($0, $1): each element from its own byte, one
# operand and one result, so that Triton can decode in whatever layout the tensor cores take, with no detour through
# shared memory. 0x43 above a 4-bit code is the bfloat16 128 + code, 0x64 above one of 8 bits the float16 1024 + code,
# and 0x4B0000 above it the float32 2^23 + code. Every step is exact.
# 128 + code.
LOW_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, m, n;
    mov.b32 m, 0x000F000F;
    mov.b32 n, 0x43004300;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    lop3.b32 $0, a, m, n, 0xEA;
    lop3.b32 $1, b, m, n, 0xEA;
}""")
# The same of the upper four bits.
HIGH_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, m, n;
    mov.b32 m, 0x000F000F;
    mov.b32 n, 0x43004300;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    shr.b32 a, a, 4;
    shr.b32 b, b, 4;
    lop3.b32 $0, a, m, n, 0xEA;
    lop3.b32 $1, b, m, n, 0xEA;
}""")
# 2^23 + code - (2^23 + 128) in float32: bfloat16 has no room for 8 bits more.
INT8_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, m;
    mov.b32 m, 0x4B000000;
    prmt.b32 a, $2, m, 0x7550;
    prmt.b32 b, $2, m, 0x7551;
    prmt.b32 c, $2, m, 0x7552;
    prmt.b32 d, $2, m, 0x7553;
    add.rn.f32 a, a, 0fCB000080;
    add.rn.f32 b, b, 0fCB000080;
    add.rn.f32 c, c, 0fCB000080;
    add.rn.f32 d, d, 0fCB000080;
    cvt.rn.bf16x2.f32 $0, b, a;
    cvt.rn.bf16x2.f32 $1, d, c;
}""")
# The seven bits at their place in bfloat16 are 2^120 too small, subnormals too.
E4M3_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $2, 0, 0x1404;
    prmt.b32 b, $2, 0, 0x3424;
    shr.b32 c, a, 4;
    shr.b32 d, b, 4;
    and.b32 c, c, 0x07F007F0;
    and.b32 d, d, 0x07F007F0;
    lop3.b32 a, a, 0x80008000, c, 0xEA;
    lop3.b32 b, b, 0x80008000, d, 0xEA;
    mov.b32 c, 0x7B807B80;
    mov.b32 d, 0x80008000;
    fma.rn.bf16x2 $0, a, c, d;
    fma.rn.bf16x2 $1, b, c, d;
}""")
# 1024 + code.
LOW_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, m, n;
    mov.b32 m, 0x000F000F;
    mov.b32 n, 0x64006400;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    lop3.b32 $0, a, m, n, 0xEA;
    lop3.b32 $1, b, m, n, 0xEA;
}""")
# The same of the upper four bits.
HIGH_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, m, n;
    mov.b32 m, 0x000F000F;
    mov.b32 n, 0x64006400;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    shr.b32 a, a, 4;
    shr.b32 b, b, 4;
    lop3.b32 $0, a, m, n, 0xEA;
    lop3.b32 $1, b, m, n, 0xEA;
}""")
# 1024 + code.
INT8_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 m;
    mov.b32 m, 0x64646464;
    prmt.b32 $0, $2, m, 0x4140;
    prmt.b32 $1, $2, m, 0x4342;
}""")
# The seven bits at their place in float16 are 2^8 too small, subnormals too.
E4M3_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $2, 0, 0x1404;
    prmt.b32 b, $2, 0, 0x3424;
    shr.b32 c, a, 1;
    shr.b32 d, b, 1;
    and.b32 c, c, 0x3F803F80;
    and.b32 d, d, 0x3F803F80;
    lop3.b32 a, a, 0x80008000, c, 0xEA;
    lop3.b32 b, b, 0x80008000, d, 0xEA;
    mov.b32 c, 0x5C005C00;
    mul.rn.f16x2 $0, a, c;
    mul.rn.f16x2 $1, b, c;
}""")


def decodes_pairs(arch: str) -> bool:
    """Whether `decode` may be FAST there. The interpreter knows no machine's instructions."""
    return arch.startswith("sm_") and not INTERPRETED


def is_woven(arch: str) -> bool:
    """Whether a row's bytes lie in the order of wgmma's threads: a thread of four takes columns 2t, 2t + 1, 2t + 8 and
    2t + 9 of every 16, by one load of 16 bytes where they are neighbours. Elsewhere Triton finds loads of 4 or more."""
    return arch == "sm_90"


def pack_codes(codes: torch.Tensor, width: int, halves: int, woven: bool = False) -> torch.Tensor:
    """codes uint8 [out_features, in_features] -> [out_features / LANES, steps, LANES, width] bytes, zeros at the ends;
    a step is `halves` (2 for 4-bit codes) times width columns."""
    rows, columns = codes.shape
    steps = triton.cdiv(columns, width * halves)
    padded = functional.pad(codes, (0, steps * width * halves - columns, 0, -rows % LANES))
    parts = padded.view(-1, LANES, steps, halves, width).permute(3, 0, 2, 1, 4)
    packed = parts[0] if halves == 1 else parts[0] | parts[1] << 4
    if woven:
        packed = packed.unflatten(-1, (width // 16, 2, 4, 2)).permute(0, 1, 2, 5, 3, 4, 6).flatten(-4)
    return packed.contiguous()


def pack_groups(per_group: torch.Tensor) -> torch.Tensor:
    """[out_features, num_groups] -> [num_groups + 1, out_features], with zeros: to a multiple of LANES, and for the
    group that the second half of the last step may begin."""
    return functional.pad(per_group.T, (0, -len(per_group) % LANES, 0, 1)).contiguous()


@triton.jit
def code_pointers(codes, column, steps, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers [COLUMNS, WIDTH] to the bytes of the first step; a step on is LANES * WIDTH."""
    lane = column + tl.arange(0, COLUMNS)
    run = (lane // _LANES).to(tl.int64) * steps * _LANES + lane % _LANES
    return codes + run[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_codes(pointers, IS_WOVEN: tl.constexpr):
    """A step's bytes [COLUMNS, WIDTH], in the order of columns."""
    codes = tl.load(pointers)
    if IS_WOVEN:
        COLUMNS: tl.constexpr = codes.shape[0]
        WIDTH: tl.constexpr = codes.shape[1]
        codes = codes.reshape(COLUMNS, 4, WIDTH // 16, 2, 2).permute(0, 2, 3, 1, 4).reshape(COLUMNS, WIDTH)
    return codes


@triton.jit
def _pairs(codes, INSTRUCTIONS: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        result = tl.inline_asm_elementwise(INSTRUCTIONS, "=r,=r,r", [codes], tl.bfloat16, is_pure=True, pack=4)
    else:
        result = tl.inline_asm_elementwise(INSTRUCTIONS, "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4)
    return result


@triton.jit
def unbias(DTYPE: tl.constexpr, CODE: tl.constexpr, FAST: tl.constexpr):
    """What to add to decoded codes to have them as they are. It is for the caller, who adds more in the same step."""
    if FAST and DTYPE == tl.bfloat16 and CODE == _INT4:
        amount = -128.0
    elif FAST and DTYPE == tl.float16:
        amount = -1024.0
    else:
        amount = middle(CODE)
    return amount


@triton.jit
def middle(CODE: tl.constexpr):
    """Of the range of codes: their zero point where none is given."""
    return 8.0 if CODE == _INT4 else 128.0


@triton.jit
def decode(codes, DTYPE: tl.constexpr, CODE: tl.constexpr, HALF: tl.constexpr, FAST: tl.constexpr):
    """codes uint8 [COLUMNS, WIDTH] -> numbers of DTYPE, exact: e4m3, or codes that `unbias` is still to be added to; of
    4-bit codes the first or second half. FAST: by NVIDIA's instructions on pairs."""
    if FAST and DTYPE == tl.bfloat16:
        if CODE == _E4M3:
            result = _pairs(codes, E4M3_TO_BFLOAT16, DTYPE)
        elif CODE == _INT8:
            result = _pairs(codes, INT8_TO_BFLOAT16, DTYPE)
        elif HALF == 0:
            result = _pairs(codes, LOW_TO_BFLOAT16, DTYPE)
        else:
            result = _pairs(codes, HIGH_TO_BFLOAT16, DTYPE)
    elif FAST and DTYPE == tl.float16:
        if CODE == _E4M3:
            result = _pairs(codes, E4M3_TO_FLOAT16, DTYPE)
        elif CODE == _INT8:
            result = _pairs(codes, INT8_TO_FLOAT16, DTYPE)
        elif HALF == 0:
            result = _pairs(codes, LOW_TO_FLOAT16, DTYPE)
        else:
            result = _pairs(codes, HIGH_TO_FLOAT16, DTYPE)
    elif CODE == _E4M3:
        result = decode_e4m3(codes).to(DTYPE)
    else:
        result = decode_int8(codes, CODE, HALF).to(tl.float32).to(DTYPE)
    return result


@triton.jit
def decode_int8(codes, CODE: tl.constexpr, HALF: tl.constexpr):
    """codes uint8 -> int8, less 8 or 128; of 4-bit codes the first or second half."""
    if CODE == _INT8:
        result = (codes ^ 128).to(tl.int8, bitcast=True)
    elif HALF == 0:
        result = (codes & 15).to(tl.int8, bitcast=True) - 8
    else:
        result = (codes >> 4).to(tl.int8, bitcast=True) - 8
    return result
