"""Owns the plain torch weight-only linear that every backend is held to.
Does not know speed."""

from typing import Any

import torch

from servd_kernels.coded_linear import BoundLinear
from servd_kernels.linear import reference as dense
from servd_kernels.linear_wna16.packed import GroupedWeight, PackedWeight
from servd_kernels.weight_quant import quantize_groups, quantize_int8, spread

MAX_ACTIVATION_GROUP = 256


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(weight: GroupedWeight, activations: str = "none", gated: bool = False) -> PackedWeight:
    """Keeps the weight in float32."""
    rows, columns = weight.codes.shape
    return PackedWeight(
        weight.dequantize(), weight.scales, None, rows // 2 if gated else rows, columns, weight.bits,
        weight.group_size, activations, gated, run,
    )  # fmt: skip


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x by the dequantized weight, in float32."""
    wide = x.float()
    if packed.activations == "int8":
        width = min(packed.group_size, MAX_ACTIVATION_GROUP)
        codes, scales = quantize_int8(x, width)
        wide = codes * spread(scales, width, x.shape[1])
    out = dense.run(wide, dense.pack(packed.data), None if bias is None else bias.float())
    return dense.follow(out, packed.gated, activation, residual).to(out_dtype or x.dtype)


def make_inputs(
    rows: int, out_features: int, in_features: int, bits: int = 4, group_size: int = 128, symmetric: bool = True,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Scales are float16, as AWQ and GPTQ store them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * max(1, in_features) ** -0.5
    codes, scales, zeros = quantize_groups(weight, bits, group_size, symmetric)
    return {
        "x": torch.randn(rows, in_features, generator=generator).to(dtype),
        "weight": GroupedWeight(codes, scales.half(), bits, group_size, zeros),
        "bias": torch.randn(out_features, generator=generator).to(dtype),
    }
