"""Owns the test of the PTX that decodes weights: a few lines of it, run here, give every code its number.
Does not know Triton's compiler; that ptxas takes the text is for the static check."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from servd_kernels import triton_gemm_codes
from servd_kernels.weight_quant import FP8

Words = np.ndarray  # uint32 [num_words], a register of each of as many threads


def halves(dtype: torch.dtype, function: Callable[..., torch.Tensor]) -> Callable[..., Words]:
    """A function of floats as an instruction on pairs: in float64, then rounded once."""

    def run(*operands: Words) -> Words:
        wide = [torch.from_numpy(word.view(np.int16).copy()).view(dtype).double() for word in operands]
        return function(*wide).to(dtype).view(torch.int16).numpy().view(np.uint32)

    return run


def prmt(a: Words, b: Words, selector: Words) -> Words:
    of = np.stack([a, b], 1).view(np.uint8)  # [num_words, 8]
    picks = [of[:, int(selector[0]) >> 4 * byte & 7] for byte in range(4)]
    return np.stack(picks, 1).view(np.uint32)[:, 0]


def lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    assert table[0] == 0xEA
    return a & b | c


def to_bfloat16_pair(high: Words, low: Words) -> Words:
    def bits(word: Words) -> Words:
        rounded = torch.from_numpy(word.view(np.float32).copy()).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)

    return bits(high) << 16 | bits(low)


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, count: a >> count,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "add.rn.f32": lambda a, b: (a.view(np.float32) + b.view(np.float32)).view(np.uint32),
    "cvt.rn.bf16x2.f32": to_bfloat16_pair,
    "fma.rn.bf16x2": halves(torch.bfloat16, lambda a, b, c: a * b + c),
    "mul.rn.f16x2": halves(torch.float16, lambda a, b: a * b),
}


def run(text: str, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that the instructions make of codes uint8 [4 * num_words]."""
    registers: dict[str, Words] = {"$2": codes.numpy().view(np.uint32)}

    def value(name: str) -> Words:
        if name in registers:
            return registers[name]
        number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.full(len(codes) // 4, number, np.uint32)

    for line in text.strip("{}\n ").split(";"):
        instruction, _, operands = line.strip().partition(" ")
        if instruction and instruction != ".reg":
            target, *sources = operands.split(", ")
            registers[target] = INSTRUCTIONS[instruction](*map(value, sources))
    pairs = np.stack([registers["$0"], registers["$1"]], 1).reshape(-1)
    return torch.from_numpy(pairs.view(np.int16).copy()).view(dtype)


CODES = torch.arange(256).to(torch.uint8)
EXPECTED = {
    "LOW_TO_BFLOAT16": (CODES & 15).float() + 128,
    "HIGH_TO_BFLOAT16": (CODES >> 4).float() + 128,
    "INT8_TO_BFLOAT16": CODES.float() - 128,
    "E4M3_TO_BFLOAT16": CODES.view(FP8).float(),
    "LOW_TO_FLOAT16": (CODES & 15).float() + 1024,
    "HIGH_TO_FLOAT16": (CODES >> 4).float() + 1024,
    "INT8_TO_FLOAT16": CODES.float() + 1024,
    "E4M3_TO_FLOAT16": CODES.view(FP8).float(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_code_becomes_its_number(name: str) -> None:
    text = getattr(triton_gemm_codes, name).value
    expected = EXPECTED[name]
    dtype = torch.bfloat16 if "BFLOAT16" in name else torch.float16
    is_number = ~expected.isnan()  # e4m3's NaN is not decoded: the weight's scale becomes NaN
    for turned in range(4):  # each code in each byte of a register
        out = run(text, CODES.roll(turned), dtype).float()
        assert torch.equal(out[is_number.roll(turned)], expected.roll(turned)[is_number.roll(turned)])
