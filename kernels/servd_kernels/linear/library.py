"""Owns the vendor's linear (cuBLAS, oneDNN) behind linear's contract, but for the order of its sums.
Does not know what that order is."""

import dataclasses

import torch
from torch.nn import functional

from servd_kernels.linear import reference
from servd_kernels.linear.packed import BoundLinear, PackedWeight


def supports(device: str, dtype: torch.dtype, deterministic: bool = True, **axes: object) -> str | None:
    if deterministic:
        return "its sums depend on the batch: it serves where deterministic=False"
    return None


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(weight: torch.Tensor, gated: bool = False) -> PackedWeight:
    """Keeps the weight as it is."""
    return dataclasses.replace(reference.pack(weight, gated), run=run)


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Where something follows the product, or out_dtype is wider than x, the sums are kept in float32."""
    out_dtype = out_dtype or x.dtype
    if not packed.gated and activation is None and residual is None and out_dtype == x.dtype:
        return functional.linear(x, packed.data, bias)
    out = _wide_product(x, packed.data, bias)
    return reference.follow(out, packed.gated, activation, residual).to(out_dtype)


def _wide_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.device.type == "cuda" and x.dtype != torch.float32:
        out = torch.mm(x, weight.T, out_dtype=torch.float32)
    else:
        out = functional.linear(x.float(), weight.float())
    return out if bias is None else out + bias.float()
