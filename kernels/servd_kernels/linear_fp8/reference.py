"""Owns the plain torch fp8 linear that every backend is held to.
Does not know speed."""

from typing import Any

import torch

from servd_kernels.coded_linear import BoundLinear
from servd_kernels.linear import reference as dense
from servd_kernels.linear_fp8.packed import PackedWeight
from servd_kernels.weight_quant import FP8, quantize_fp8


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(codes: torch.Tensor, scales: torch.Tensor, activations: str = "none", gated: bool = False) -> PackedWeight:
    """Keeps the codes as float32 numbers."""
    rows, columns = codes.shape
    return PackedWeight(codes.float(), scales, rows // 2 if gated else rows, columns, activations, gated, run)


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scales: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Numbers first, scales after: what a multiplication of e4m3 by e4m3 does."""
    out_dtype = out_dtype or (torch.float32 if x.dtype == FP8 else x.dtype)
    if packed.activations == "fp8" and x_scales is None:
        x, x_scales = quantize_fp8(x)
    out = dense.run(x.float(), dense.pack(packed.data))
    if x_scales is not None:
        out = out * x_scales.unsqueeze(1)
    out = out * packed.scales
    if bias is not None:
        out = out + bias.float()
    return dense.follow(out, packed.gated, activation, residual).to(out_dtype)


def make_inputs(
    rows: int, out_features: int, in_features: int, bias: bool = False,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * max(1, in_features) ** -0.5
    codes, scales = quantize_fp8(weight)
    return {
        "x": torch.randn(rows, in_features, generator=generator).to(dtype),
        "codes": codes,
        "scales": scales,
        "bias": torch.randn(out_features, generator=generator).to(dtype) if bias else None,
        "weight": weight,
    }
