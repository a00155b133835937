"""Owns the plain torch W8A8 linear that every backend is held to.
Does not know speed."""

from typing import Any

import torch

from servd_kernels.coded_linear import BoundLinear
from servd_kernels.linear import reference as dense
from servd_kernels.linear_w8a8.packed import PackedWeight
from servd_kernels.weight_quant import quantize_int8, rotate


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(
    codes: torch.Tensor, scales: torch.Tensor, activation_group: int | None = None, gated: bool = False,
    rotation: int | None = None,
) -> PackedWeight:  # fmt: skip
    """Keeps the codes as they are."""
    rows, columns = codes.shape
    return PackedWeight(codes, scales, rows // 2 if gated else rows, columns, activation_group, rotation, gated, run)


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scales: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Integers multiplied as float64, which holds every sum: exact, so that torch's order of summation is no matter."""
    out_dtype = out_dtype or (torch.float32 if x.dtype == torch.int8 else x.dtype)
    width = packed.activation_group
    if packed.rotation and x_scales is None:
        x = rotate(x, packed.rotation)
    codes, scales = (x, x_scales) if x_scales is not None else quantize_int8(x, width)
    weight = packed.data.double().T
    out = torch.zeros(len(x), len(packed.data), device=x.device)
    for group, scale in enumerate((scales if width else scales.unsqueeze(1)).unbind(1)):
        columns = slice(group * width, (group + 1) * width) if width else slice(None)
        out += (codes[:, columns].double() @ weight[columns]).float() * scale.unsqueeze(1)
    out *= packed.scales
    if bias is not None:
        out += bias.float()
    return dense.follow(out, packed.gated, activation, residual).to(out_dtype)


def make_inputs(
    rows: int, out_features: int, in_features: int, bias: bool = False,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * max(1, in_features) ** -0.5
    codes, scales = quantize_int8(weight)
    return {
        "x": torch.randn(rows, in_features, generator=generator).to(dtype),
        "codes": codes,
        "scales": scales,
        "bias": torch.randn(out_features, generator=generator).to(dtype) if bias else None,
        "weight": weight,
    }
