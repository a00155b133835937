"""Owns x @ weight.T + bias over fp8 e4m3 weights scaled by output channel, activations as they are or in e4m3 too.
Does not know layers, nor how codes are made (weight_quant.py; Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433)."""

import torch

from servd_kernels.coded_linear import FLOATS, BoundLinear, check_end, check_gated
from servd_kernels.linear_fp8.packed import PackedWeight
from servd_kernels.registry import Op
from servd_kernels.weight_quant import FP8, quantize_fp8

__all__ = ["OP", "BoundLinear", "PackedWeight", "linear_fp8", "pack", "quantize_weight"]

OP = Op("linear_fp8")
ACTIVATIONS = ("none", "fp8")


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out_features, in_features] -> codes float8_e4m3fn of that shape, scales float32 [out_features]."""
    return quantize_fp8(weight)


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    activations: str = "none",
    backend: str | None = None,
    gated: bool = False,
) -> PackedWeight:
    """codes float8_e4m3fn [out_features, in_features] and scales float32 [out_features] in the backend's layout.

    activations: "none" multiplies x as it comes, "fp8" rounds each row of it to e4m3 first, by its absmax / 448.
    With `gated` the codes are a gate matrix above an up matrix, [2 * out_features, in_features], and the result is
    activation(gate) * up. Raises ValueError for shapes, dtypes or names that do not fit.
    """
    if codes.dim() != 2 or codes.dtype != FP8:
        raise ValueError(f"codes must be {FP8} [out_features, in_features], not {codes.dtype} {list(codes.shape)}")
    if scales.shape != codes.shape[:1] or scales.dtype != torch.float32:
        raise ValueError(f"scales must be torch.float32 [{len(codes)}], not {scales.dtype} {list(scales.shape)}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}; allowed: {', '.join(ACTIVATIONS)}")
    check_gated(len(codes), gated)
    bound: BoundLinear = OP.bind(  # type: ignore[assignment]
        codes.device.type, scales.dtype, backend, activations=activations
    )
    packed: PackedWeight = bound.pack(codes, scales, activations, gated)
    return packed


def linear_fp8(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scales: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [num_rows, in_features] -> [num_rows, out_features].

    x is float32, bfloat16 or float16; or, where the weight was packed for "fp8" activations, float8_e4m3fn codes with
    x_scales float32 [num_rows]. bias [out_features] (twice as many with a gate: the gate's first) and residual
    [num_rows, out_features] are of any of the three. Sums in float32 in one order, then activation(sum * x_scale *
    weight_scale + bias) + residual, rounded once to out_dtype: x's by default, float32 where x is codes. Activations:
    silu, gelu, gelu_tanh. Raises ValueError for shapes, dtypes or an activation that do not fit, and for a strided
    bias or residual.
    """
    check_end(packed, x, bias, out_dtype, activation, residual)
    allowed = (*FLOATS, FP8) if packed.activations == "fp8" else FLOATS
    if x.dtype not in allowed:
        raise ValueError(f"x is {x.dtype}; allowed: {', '.join(map(str, allowed))}")
    if (x_scales is not None) != (x.dtype == FP8):
        raise ValueError(f"x_scales must be given where x is {FP8} and only there; x is {x.dtype}")
    if x_scales is not None and (x_scales.shape != (len(x),) or x_scales.dtype != torch.float32):
        raise ValueError(f"x_scales must be torch.float32 [{len(x)}], not {x_scales.dtype} {list(x_scales.shape)}")
    return packed.run(x, packed, bias, out_dtype, x_scales, activation, residual)
