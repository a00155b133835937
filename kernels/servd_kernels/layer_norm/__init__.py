"""Owns LayerNorm (Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450) with the residual add fused.
Does not know the model."""

import torch

from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

OP = Op("layer_norm")


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, over the last dimension, with float32 statistics.

    x [..., hidden] (may be strided outside the last dimension), weight [hidden], bias [hidden] or None, residual like
    x; float32, bfloat16 or float16. With a residual, x + residual, rounded to the dtype, is normalised, and the
    result is (out, x + residual). Raises ValueError for shapes or dtypes that do not fit.
    """
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (x.dim() == 0 or vector.shape != x.shape[-1:]):
            raise ValueError(f"{name} must be {list(x.shape[-1:])} for x {list(x.shape)}, not {list(vector.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} like x, not {list(residual.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} like x, not {tensor.dtype}")
    check_last_stride(weight=weight, bias=bias)
    run = OP.bind(x.device.type, x.dtype, backend, hidden=x.shape[-1])
    result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = run(x, weight, bias, eps, residual)
    return result
