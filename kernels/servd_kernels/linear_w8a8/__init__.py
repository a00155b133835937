"""Owns x @ weight.T + bias in int8: weights scaled by output channel, activations by row or by group of columns.
Does not know layers, nor how codes are made (weight_quant.py; Dettmers et al. 2022, https://arxiv.org/abs/2208.07339)."""

import torch

from servd_kernels.linear.packed import ACTIVATIONS as ACTIVATION_NAMES
from servd_kernels.linear_w8a8.packed import BoundLinear, PackedWeight
from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride
from servd_kernels.weight_quant import group_count, quantize_int8

__all__ = ["OP", "BoundLinear", "PackedWeight", "linear_w8a8", "pack", "quantize_weight"]

OP = Op("linear_w8a8")
ACTIVATION_GROUPS = (None, 32, 64, 128, 256)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_IN_FEATURES = 1 << 17  # 127 * 127 * in_features must fit into int32


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out_features, in_features] -> codes int8 of that shape, scales float32 [out_features]."""
    return quantize_int8(weight)


def pack(
    codes: torch.Tensor, scales: torch.Tensor, activation_group: int | None = None, backend: str | None = None
) -> PackedWeight:
    """codes int8 [out_features, in_features] (-127..127) and scales float32 [out_features] in the backend's layout.

    activation_group: how many columns of x share a scale (32, 64, 128, 256); None: the whole row. Raises ValueError
    for shapes or dtypes that do not fit.
    """
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be torch.int8 [out_features, in_features], not {codes.dtype} {list(codes.shape)}")
    if scales.shape != codes.shape[:1] or scales.dtype != torch.float32:
        raise ValueError(f"scales must be torch.float32 [{len(codes)}], not {scales.dtype} {list(scales.shape)}")
    if activation_group not in ACTIVATION_GROUPS:
        raise ValueError(f"activation_group is {activation_group}; allowed: {', '.join(map(str, ACTIVATION_GROUPS))}")
    if codes.shape[1] > MAX_IN_FEATURES:
        raise ValueError(f"in_features is {codes.shape[1]}; allowed: up to {MAX_IN_FEATURES}, or int32 sums overflow")
    if codes.numel() and int(codes.min()) == -128:
        raise ValueError("codes hold -128; allowed: -127..127")
    bound: BoundLinear = OP.bind(codes.device.type, scales.dtype, backend)  # type: ignore[assignment]
    return bound.pack(codes, scales, activation_group)


def linear_w8a8(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scales: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """x [num_rows, in_features], bias [out_features] -> [num_rows, out_features].

    x is float32, bfloat16 or float16 and quantized here, each row (or group of columns) by its absmax / 127; or it is
    int8 codes, with x_scales float32 [num_rows], or [num_rows, num_groups] where the weight was packed for groups.
    Sums over whole rows are exact integers; sums of groups are added in float32 in ascending order. Then
    activation(sum * x_scale * weight_scale + bias), rounded once to out_dtype: x's by default, float32 where x is
    codes. Activations: silu, gelu, gelu_tanh. A row with NaN or infinity comes out as NaN. Raises ValueError for
    shapes, dtypes or an activation that do not fit.
    """
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x must be [num_rows, {packed.in_features}], not {list(x.shape)}")
    if x.dtype != torch.int8 and x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}; allowed: {', '.join(map(str, FLOATS))}, torch.int8")
    _check_scales(x, x_scales, packed)
    if bias is not None and (bias.shape != (packed.out_features,) or bias.dtype not in FLOATS):
        raise ValueError(f"bias must be floating [{packed.out_features}], not {bias.dtype} {list(bias.shape)}")
    check_last_stride(bias=bias)
    if out_dtype is not None and out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}; allowed: {', '.join(map(str, FLOATS))}")
    if activation not in ACTIVATION_NAMES:
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(map(str, ACTIVATION_NAMES))}")
    return packed.run(x, packed, bias, out_dtype, x_scales, activation)


def _check_scales(x: torch.Tensor, x_scales: torch.Tensor | None, packed: PackedWeight) -> None:
    if (x_scales is not None) != (x.dtype == torch.int8):
        raise ValueError(f"x_scales must be given where x is torch.int8 and only there; x is {x.dtype}")
    if x_scales is None:
        return
    shape = [len(x)]
    if packed.activation_group:
        shape.append(group_count(packed.in_features, packed.activation_group))
    if list(x_scales.shape) != shape or x_scales.dtype != torch.float32:
        raise ValueError(f"x_scales must be torch.float32 {shape}, not {x_scales.dtype} {list(x_scales.shape)}")
