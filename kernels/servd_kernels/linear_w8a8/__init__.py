"""Owns x @ weight.T + bias in int8: weights scaled by output channel, activations by row or by group of columns.
Does not know layers, nor how codes are made (weight_quant.py; Dettmers et al. 2022, https://arxiv.org/abs/2208.07339)."""

import torch

from servd_kernels.coded_linear import FLOATS, BoundLinear, check_end, check_gated
from servd_kernels.linear_w8a8.packed import PackedWeight
from servd_kernels.registry import Op
from servd_kernels.weight_quant import group_count, quantize_int8, rotate

__all__ = ["OP", "BoundLinear", "PackedWeight", "linear_w8a8", "pack", "quantize_weight"]

OP = Op("linear_w8a8")
ACTIVATION_GROUPS = (None, 32, 64, 128, 256)
ROTATIONS = (None, 16, 32, 64, 128, 256)
MAX_IN_FEATURES = 1 << 17  # 127 * 127 * in_features must fit into int32


def quantize_weight(weight: torch.Tensor, rotation: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out_features, in_features] -> codes int8 of that shape, scales float32 [out_features].

    rotation: the same as in `pack`; the weight's blocks of so many columns are rotated first.
    """
    return quantize_int8(rotate(weight, rotation) if rotation else weight)


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    activation_group: int | None = None,
    backend: str | None = None,
    gated: bool = False,
    rotation: int | None = None,
) -> PackedWeight:
    """codes int8 [out_features, in_features] (-127..127) and scales float32 [out_features] in the backend's layout.

    activation_group: how many columns of x share a scale (32, 64, 128, 256); None: the whole row. With `gated` the
    codes are a gate matrix above an up matrix, [2 * out_features, in_features], and the result is activation(gate) *
    up (Shazeer 2020, "GLU Variants Improve Transformer"). rotation: x is rotated in blocks of so many columns before
    it is rounded, as the weight was before it (weight_quant.rotate); 16, 32, 64, 128 or 256, dividing in_features.
    Raises ValueError for shapes, dtypes or sizes that do not fit.
    """
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be torch.int8 [out_features, in_features], not {codes.dtype} {list(codes.shape)}")
    if scales.shape != codes.shape[:1] or scales.dtype != torch.float32:
        raise ValueError(f"scales must be torch.float32 [{len(codes)}], not {scales.dtype} {list(scales.shape)}")
    check_gated(len(codes), gated)
    for name, size, known in (
        ("activation_group", activation_group, ACTIVATION_GROUPS),
        ("rotation", rotation, ROTATIONS),
    ):
        if size not in known:
            raise ValueError(f"{name} is {size}; allowed: {', '.join(map(str, known))}")
    if codes.shape[1] % (rotation or 1):
        raise ValueError(f"rotation is {rotation}; allowed: what divides in_features, {codes.shape[1]}")
    if codes.shape[1] > MAX_IN_FEATURES:
        raise ValueError(f"in_features is {codes.shape[1]}; allowed: up to {MAX_IN_FEATURES}, or int32 sums overflow")
    if codes.numel() and int(codes.min()) == -128:
        raise ValueError("codes hold -128; allowed: -127..127")
    bound: BoundLinear = OP.bind(codes.device.type, scales.dtype, backend)  # type: ignore[assignment]
    packed: PackedWeight = bound.pack(codes, scales, activation_group, gated, rotation)
    return packed


def linear_w8a8(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scales: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [num_rows, in_features] -> [num_rows, out_features].

    x is float32, bfloat16 or float16 and quantized here, each row (or group of columns) by its absmax / 127, after the
    rotation that the weight was packed for; or it is int8 codes, of x rotated already, with x_scales float32
    [num_rows], or [num_rows, num_groups] where the weight was packed for groups. bias [out_features] (twice as many
    with a gate: the gate's first) and residual [num_rows, out_features] are of any of the three.
    Sums over whole rows are exact integers; sums of groups are added in float32 in ascending order. Then
    activation(sum * x_scale * weight_scale + bias) + residual, rounded once to out_dtype: x's by default, float32
    where x is codes. Activations: silu, gelu, gelu_tanh. A row with NaN or infinity comes out as NaN. Raises
    ValueError for shapes, dtypes or an activation that do not fit, and for a strided bias or residual.
    """
    if x.dtype != torch.int8 and x.dtype not in FLOATS:
        raise ValueError(f"x is {x.dtype}; allowed: {', '.join(map(str, FLOATS))}, torch.int8")
    check_end(packed, x, bias, out_dtype, activation, residual)
    _check_scales(x, x_scales, packed)
    return packed.run(x, packed, bias, out_dtype, x_scales, activation, residual)


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
