"""Owns the measured cases that the norms share.
Does not know how they are timed, nor any one norm."""

from collections.abc import Callable
from typing import Any

import torch

from servd_kernels.bench import Call, Case
from servd_kernels.registry import Op

_SHAPES = {
    "cpu": [(rows, 576) for rows in (1, 32, 512)],  # the starter model
    "cuda": [(rows, 4096) for rows in (1, 64, 4096)],  # Llama-3-8B
}
EPS = 1e-5


def cases(op: Op, device: str, vectors: int, theirs: Callable[..., object]) -> list[Case]:
    """Of a norm run(x, *vectors of [hidden], eps, residual); `theirs(x, hidden, *vectors)` is torch's."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    return [
        _case(op.bind(device, dtype, hidden=hidden), device, rows, hidden, dtype, vectors, has_residual, theirs)
        for dtype in dtypes
        for has_residual in (False, True)
        for rows, hidden in _SHAPES[device]
    ]


def _case(
    run: Callable[..., Any],
    device: str,
    rows: int,
    hidden: int,
    dtype: torch.dtype,
    vectors: int,
    has_residual: bool,
    theirs: Callable[..., object],
) -> Case:
    def make(seed: int) -> tuple[Call, Call]:
        x, other = torch.randn(2, rows, hidden, dtype=dtype, device=device)
        weights = torch.randn(vectors, hidden, dtype=dtype, device=device).unbind()
        if has_residual:
            return lambda: run(x, *weights, EPS, other), lambda: theirs(x + other, hidden, *weights)
        return lambda: run(x, *weights, EPS), lambda: theirs(x, hidden, *weights)

    moved = (4 if has_residual else 2) * rows * hidden * dtype.itemsize
    return Case(f"{rows}x{hidden} {str(dtype).removeprefix('torch.')}{' + residual' * has_residual}", make, moved)
