"""Owns RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) with the residual add fused.
Does not know the model: a row is a hidden state, or one head for QK-norm."""

import torch

from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

OP = Op("rms_norm")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, with float32 statistics.

    x [..., hidden] (may be strided outside the last dimension), weight [hidden], residual like x; float32,
    bfloat16 or float16. With a residual, x + residual, rounded to the dtype, is normalised, and the result
    is (out, x + residual). Raises ValueError for shapes or dtypes that do not fit.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be {list(x.shape[-1:])} for x {list(x.shape)}, not {list(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} like x, not {list(residual.shape)}")
    for name, tensor in (("weight", weight), ("residual", residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} like x, not {tensor.dtype}")
    check_last_stride(weight=weight)
    run = OP.bind(x.device.type, x.dtype, backend, hidden=x.shape[-1])
    result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = run(x, weight, eps, residual)
    return result
