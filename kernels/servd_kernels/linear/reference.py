"""Owns the plain torch linear that every backend is held to, and that serves where there is no compiler.
Does not know speed, nor torch's own order of summation."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from servd_kernels.linear.packed import BoundLinear, PackedWeight

_ROWS = 8


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


ACTIVATION_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def pack(weight: torch.Tensor, gated: bool = False) -> PackedWeight:
    """Keeps the weight as it is."""
    out_features = weight.shape[0] // (2 if gated else 1)

    def rows(ids: torch.Tensor) -> torch.Tensor:
        if gated:
            raise ValueError("rows of a gated weight are not kept in order: pack it with gated=False")
        return functional.embedding(ids, weight)

    return PackedWeight(weight, out_features, weight.shape[1], run, rows, gated=gated)


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """What follows the product is computed in float32 and rounded once, as the contract says."""
    out_dtype = out_dtype or x.dtype
    if not packed.gated and activation is None and residual is None:
        return _product(x, packed.data, bias, out_dtype)
    out = _product(x, packed.data, bias, torch.float32)
    return follow(out, packed.gated, activation, residual).to(out_dtype)


def follow(
    out: torch.Tensor, gated: bool, activation: str | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """What linear does to the float32 product, in float32."""
    up: torch.Tensor | None = None
    if gated:
        out, up = out.chunk(2, dim=1)
    if activation is not None:
        out = ACTIVATION_FUNCTIONS[activation](out)
    if up is not None:
        out = out * up
    return out if residual is None else out + residual.float()


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """torch picks its order of summation by shape, so that every product here has the same one: 8 rows, the
    last few padded. That is as batch-invariant as torch allows: a row's place among the 8, and torch's number
    of threads, are out of our hands."""
    rows = len(x)
    weight = weight.to(out_dtype)
    bias = None if bias is None else bias.to(out_dtype)
    padded = functional.pad(x.to(out_dtype), (0, 0, 0, -rows % _ROWS))
    out = padded.new_empty(len(padded), len(weight))
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
