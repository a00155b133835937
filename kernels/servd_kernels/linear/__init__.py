"""Owns x @ weight.T + bias over a weight packed once, with bits of a row that no other row can change.
Does not know layers, tensor parallelism or quantized weights (Goto & van de Geijn 2008, for the packing)."""

import torch

from servd_kernels.linear.packed import ACTIVATIONS, BoundLinear, PackedWeight
from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

__all__ = ["OP", "BoundLinear", "PackedWeight", "linear", "pack"]

OP = Op("linear")


def pack(
    weight: torch.Tensor, backend: str | None = None, gated: bool = False, deterministic: bool = True
) -> PackedWeight:
    """The weight [out_features, in_features] (float32, bfloat16 or float16) in the backend's own layout.

    With `gated` it is a gate matrix above an up matrix, [2 * out_features, in_features], and `linear` gives
    activation(gate) * up (Shazeer 2020, "GLU Variants Improve Transformer"). With deterministic=False a vendor's
    routine may serve, whose bits depend on the batch. Raises ValueError for another shape.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], not {list(weight.shape)}")
    if gated and len(weight) % 2:
        raise ValueError(f"a gated weight must have as many up rows as gate rows, not {len(weight)} in all")
    bound: BoundLinear = OP.bind(  # type: ignore[assignment]
        weight.device.type, weight.dtype, backend, deterministic=deterministic
    )
    return bound.pack(weight, gated)


def linear(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x @ weight.T + bias) + residual: x [num_rows, in_features] -> [num_rows, out_features].

    x, bias [out_features] (twice as many with a gate: the gate's first) and residual [num_rows, out_features] have
    the weight's dtype. Activations: silu, gelu, gelu_tanh. Sums in float32, in one order for each output element
    whatever num_rows; what follows is float32 too, and rounds once, to out_dtype: x's (the default) or float32, which
    logits need (a bfloat16 logit of 20 has steps of 0.125). Raises ValueError for shapes, dtypes or an activation
    that do not fit, and for a strided bias or residual.
    """
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x must be [num_rows, {packed.in_features}], not {list(x.shape)}")
    if x.dtype != packed.data.dtype:
        raise ValueError(f"x must be {packed.data.dtype} like the weight, not {x.dtype}")
    _check_shape("bias", bias, x.dtype, ((2 if packed.gated else 1) * packed.out_features,))
    _check_shape("residual", residual, x.dtype, (x.shape[0], packed.out_features))
    check_last_stride(bias=bias, residual=residual)
    if out_dtype not in (None, x.dtype, torch.float32):
        raise ValueError(f"out_dtype must be {x.dtype} or torch.float32, not {out_dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(str, ACTIVATIONS))}, not {activation!r}")
    return packed.run(x, packed, bias, out_dtype, activation, residual)


def _check_shape(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
        raise ValueError(f"{name} must be {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")
