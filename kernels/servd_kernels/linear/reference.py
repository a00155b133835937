"""Owns the plain torch linear that every backend is held to, and that serves where there is no compiler.
Does not know speed, nor torch's own order of summation."""

from typing import Any

import torch
from torch.nn import functional

from servd_kernels.linear.packed import BoundLinear, PackedWeight

_ROWS = 8


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(weight: torch.Tensor) -> PackedWeight:
    """Keeps the weight as it is."""
    return PackedWeight(weight, weight.shape[0], weight.shape[1], run, lambda ids: functional.embedding(ids, weight))


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """torch picks its order of summation by shape, so that every product here has the same one: 8 rows, the
    last few padded. That is as batch-invariant as torch allows: a row's place among the 8, and torch's number
    of threads, are out of our hands."""
    rows = len(x)
    out_dtype = out_dtype or x.dtype
    weight = packed.data.to(out_dtype)
    bias = None if bias is None else bias.to(out_dtype)
    padded = functional.pad(x.to(out_dtype), (0, 0, 0, -rows % _ROWS))
    out = padded.new_empty(len(padded), packed.out_features)
    for first in range(0, rows, _ROWS):
        tile = slice(first, first + _ROWS)
        out[tile] = functional.linear(padded[tile], weight, bias)
    return out[:rows]


def make_inputs(
    rows: int, out_features: int, in_features: int, bias: bool = False,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    return {
        "x": torch.randn(rows, in_features, generator=generator).to(dtype),
        "weight": weight.to(dtype),
        "bias": torch.randn(out_features, generator=generator).to(dtype) if bias else None,
    }
