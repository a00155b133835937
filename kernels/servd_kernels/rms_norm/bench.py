"""Owns the measured cases of rms_norm.
Does not know how they are timed."""

from collections.abc import Callable

import torch
from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.rms_norm import OP, reference


def _case(rows: int, hidden: int, dtype: torch.dtype) -> Case:
    run = OP.bind("cpu", dtype)

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        inputs = reference.make_inputs(rows, hidden, dtype, residual=True, seed=seed)
        x, weight, eps, residual = inputs.values()
        return (
            lambda: run(x, weight, eps, residual),
            lambda: functional.rms_norm(x + residual, (hidden,), weight, eps),
        )

    name = f"{rows}x{hidden} {str(dtype).removeprefix('torch.')}"
    return Case(name, make, 4 * rows * hidden * dtype.itemsize)


CASES = [_case(rows, 576, dtype) for dtype in (torch.float32, torch.bfloat16) for rows in (1, 32, 512)]
