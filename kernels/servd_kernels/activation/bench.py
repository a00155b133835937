"""Owns the measured cases that the activation ops share.
Does not know how they are timed, nor any one op."""

from collections.abc import Callable
from typing import Any

import torch

from servd_kernels.bench import Call, Case
from servd_kernels.registry import Op

_SHAPES = {
    "cpu": [(rows, 1536) for rows in (1, 32, 512)],  # the starter model
    "cuda": [(rows, 14336) for rows in (1, 64, 4096)],  # Llama-3-8B
}


def cases(op: Op, device: str, is_gated: bool, theirs: Callable[..., object], **options: Any) -> list[Case]:
    """Of an op; `theirs(first)` or, gated, `theirs(first, second)` is torch's."""
    outputs: list[tuple[torch.dtype, torch.dtype | None]] = [
        (torch.bfloat16, out_dtype) for out_dtype in (None, torch.int8, torch.float8_e4m3fn)
    ]
    if device == "cpu":
        outputs.insert(0, (torch.float32, None))
    return [
        _case(op, device, rows, width, dtype, out_dtype, is_gated, theirs, options)
        for dtype, out_dtype in outputs
        for rows, width in _SHAPES[device]
    ]


def _case(
    op: Op,
    device: str,
    rows: int,
    width: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    is_gated: bool,
    theirs: Callable[..., object],
    options: dict[str, Any],
) -> Case:
    run = op.bind(device, dtype, width=width, out_dtype=out_dtype)
    parts = 2 if is_gated else 1

    def make(seed: int) -> tuple[Call, Call]:
        x = torch.randn(rows, parts * width, dtype=dtype, device=device)
        halves = x.chunk(parts, dim=-1)
        return lambda: run(x, **options, out_dtype=out_dtype), lambda: theirs(*halves)

    output_bytes = rows * width * dtype.itemsize if out_dtype is None else rows * (width + 4)
    name = " ".join(
        [f"{rows}x{width}", _name(dtype), *options.values(), *([f"to {_name(out_dtype)}"] if out_dtype else [])]
    )
    return Case(name, make, parts * rows * width * dtype.itemsize + output_bytes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
