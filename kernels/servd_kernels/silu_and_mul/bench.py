"""Owns the measured cases of silu_and_mul.
Does not know how they are timed."""

from collections.abc import Callable

import torch
from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.silu_and_mul import OP, reference


def _case(rows: int, width: int, dtype: torch.dtype) -> Case:
    run = OP.bind("cpu", dtype)

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        x = reference.make_inputs(rows, width, dtype, seed)["x"]
        return lambda: run(x), lambda: functional.silu(x[:, :width]) * x[:, width:]

    name = f"{rows}x{width} {str(dtype).removeprefix('torch.')}"
    return Case(name, make, 3 * rows * width * dtype.itemsize)


CASES = [_case(rows, 1536, dtype) for dtype in (torch.float32, torch.bfloat16) for rows in (1, 32, 512)]
