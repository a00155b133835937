"""Owns kernels that must not ship, one for each fault that servd_kernels.static looks for; prints its reports as JSON.
Does not know pytest: a process of its own, because kernels compile only where TRITON_INTERPRET is not set."""

import dataclasses
import json
import sys

import triton
import triton.language as tl
from servd_kernels.static import compile_case
from servd_kernels.triton_support import ARCHITECTURES, CompileCase


@triton.jit
def many_live_values(x, out, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    values = tl.load(x + offsets)
    tl.debug_barrier()
    total = tl.sum(values)  # every value waits in a register for the sum
    tl.store(out + offsets, values * total)


@triton.jit
def product(x, y, out, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    a, b = tl.load(x + rows * SIZE + columns), tl.load(y + rows * SIZE + columns)
    tl.store(out + rows * SIZE + columns, tl.dot(a, b, input_precision="ieee"))


@triton.jit
def unknown_name(x, out, SIZE: tl.constexpr):
    tl.store(out, no_such_function(x))  # noqa: F821


def case(name: str, kernel: object, pointers: str, size: int, **options: object) -> CompileCase:
    names = [argument for argument in kernel.arg_names if argument != "SIZE"]
    return CompileCase(name, kernel, dict.fromkeys(names, pointers), {"SIZE": size}, **options)


CASES = [
    case("spill", many_live_values, "*fp32", 32768, num_warps=1),
    case("dot of float32", product, "*fp32", 64, uses_dot=True),
    case("dot of bfloat16", product, "*bf16", 64, uses_dot=True),
    case("shared memory", product, "*bf16", 256, uses_dot=True, num_warps=16, architectures=("sm_80", "gfx942")),
    case("error", unknown_name, "*fp32", 64),
]

if __name__ == "__main__":
    reports = [compile_case("faults", c, name) for name in ARCHITECTURES for c in CASES if name in c.architectures]
    json.dump([dataclasses.asdict(report) for report in reports], sys.stdout)
