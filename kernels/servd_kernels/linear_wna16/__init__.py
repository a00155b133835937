"""Owns x @ weight.T + bias over weights of 4 or 8 bits, scaled by groups of input columns (AWQ, GPTQ, GGUF).
Does not know layers or files (Frantar et al. 2022, https://arxiv.org/abs/2210.17323; Lin et al. 2023, 2306.00978)."""

import torch

from servd_kernels.coded_linear import FLOATS, BoundLinear, check_end, check_gated
from servd_kernels.linear_wna16.packed import ACTIVATIONS, GroupedWeight, PackedWeight
from servd_kernels.registry import Op
from servd_kernels.weight_quant import quantize_groups

__all__ = ["OP", "BoundLinear", "GroupedWeight", "PackedWeight", "linear_wna16", "pack", "quantize_weight"]

OP = Op("linear_wna16")


def quantize_weight(
    weight: torch.Tensor,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> GroupedWeight:
    """Rounds weight [out_features, in_features] to the nearest codes; group_size None: one group for a whole row."""
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; allowed: 4, 8")
    group_size = group_size or max(1, weight.shape[1])
    codes, scales, zeros = quantize_groups(weight, bits, group_size, symmetric)
    return GroupedWeight(codes, scales.to(scale_dtype), bits, group_size, zeros)


def pack(
    weight: GroupedWeight, activations: str = "none", backend: str | None = None, gated: bool = False
) -> PackedWeight:
    """The weight in the backend's own layout.

    activations: "none" multiplies x as it comes; "int8" rounds it first, to int8 in each of the weight's groups (of
    256 columns at most), and multiplies integers: faster, and as exact as those codes of x. With `gated` the
    weight is a gate matrix above an up matrix, [2 * out_features, in_features], and the result is activation(gate) *
    up. Raises ValueError for another name, and where the backend asked for cannot serve the weight.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}; allowed: {', '.join(ACTIVATIONS)}")
    check_gated(len(weight.codes), gated)
    bound: BoundLinear = OP.bind(  # type: ignore[assignment]
        weight.codes.device.type, weight.scales.dtype, backend,
        bits=weight.bits, group_size=weight.group_size, in_features=weight.codes.shape[1], activations=activations,
    )  # fmt: skip
    packed: PackedWeight = bound.pack(weight, activations, gated)
    return packed


def linear_wna16(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [num_rows, in_features] float32, bfloat16 or float16 -> [num_rows, out_features].

    activation(x @ weight.T + bias) + residual: silu, gelu, gelu_tanh or none. bias [out_features] (twice as many with
    a gate: the gate's first) and residual [num_rows, out_features] are of any of the three dtypes. Sums in float32,
    group by group in ascending order whatever num_rows; codes are never rounded to x's dtype. Rounds once, to
    out_dtype: x's by default. Raises ValueError for shapes, dtypes or an activation that do not fit, and for a
    strided bias or residual.
    """
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}; allowed: {', '.join(map(str, FLOATS))}")
    check_end(packed, x, bias, out_dtype, activation, residual)
    return packed.run(x, packed, bias, out_dtype, activation, residual)
