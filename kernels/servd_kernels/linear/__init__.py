"""Owns x @ weight.T + bias over a weight packed once, with bits of a row that no other row can change.
Does not know layers, tensor parallelism or quantized weights (Goto & van de Geijn 2008, for the packing)."""

import torch

from servd_kernels.linear.packed import BoundLinear, PackedWeight
from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

__all__ = ["OP", "BoundLinear", "PackedWeight", "linear", "pack"]

OP = Op("linear")


def pack(weight: torch.Tensor, backend: str | None = None) -> PackedWeight:
    """The weight [out_features, in_features] (float32, bfloat16 or float16) in the backend's own layout."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], not {list(weight.shape)}")
    bound: BoundLinear = OP.bind(weight.device.type, weight.dtype, backend)  # type: ignore[assignment]
    return bound.pack(weight)


def linear(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [num_rows, in_features] of the weight's dtype, bias [out_features] -> [num_rows, out_features].

    Sums in float32, in one order for each output element whatever num_rows; rounds once, to out_dtype: x's (the
    default) or float32, which logits need (a bfloat16 logit of 20 has steps of 0.125). Raises ValueError for shapes or
    dtypes that do not fit, and for a strided bias.
    """
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x must be [num_rows, {packed.in_features}], not {list(x.shape)}")
    if x.dtype != packed.data.dtype:
        raise ValueError(f"x must be {packed.data.dtype} like the weight, not {x.dtype}")
    if bias is not None and (bias.shape != (packed.out_features,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} [{packed.out_features}], not {bias.dtype} {list(bias.shape)}")
    check_last_stride(bias=bias)
    if out_dtype not in (None, x.dtype, torch.float32):
        raise ValueError(f"out_dtype must be {x.dtype} or torch.float32, not {out_dtype}")
    return packed.run(x, packed, bias, out_dtype)
