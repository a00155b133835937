"""Owns what the activation ops share: their forms, their inputs' rows, and output quantized by row.
Does not know any one op, or vectors."""

import math

import torch
from torch import Tensor

APPROXIMATIONS = ("none", "tanh")  # of GELU's normal distribution, as torch names them
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest code


def check_options(approximate: str, out_dtype: torch.dtype | None) -> None:
    """Raises ValueError for what is not among APPROXIMATIONS and LIMITS; None is the dtype of x."""
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate is {approximate!r}; allowed: {', '.join(APPROXIMATIONS)}")
    if out_dtype is not None and out_dtype not in LIMITS:
        raise ValueError(f"out_dtype is {out_dtype}; allowed: None, {', '.join(map(str, LIMITS))}")


def check_gated(x: Tensor) -> None:
    """Raises ValueError if the last dimension does not hold a gate and a value of equal width."""
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"the last dimension of x must be even, not {list(x.shape)}")


def quantize_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 [..., width] -> codes [..., width] of int8 or float8_e4m3fn, scales float32 [...]; width at least 1.

    A scale is the row's largest size over the largest code; a code is value * (1 / scale) to nearest even. A row that
    holds NaN or infinity has a scale that is not finite, and codes 0.
    """
    limit = LIMITS[dtype]
    most = values.abs().amax(-1)
    ratios = (values * (limit / most).unsqueeze(-1)).nan_to_num(nan=0.0).clamp(-limit, limit)
    return (ratios if dtype.is_floating_point else ratios.round()).to(dtype), most / limit


def gelu_values(x: Tensor, approximate: str) -> Tensor:
    """GELU in plain torch, float32 of a float64 computation: torch's own depends on strides, and is off at infinity."""
    wide = x.double()
    if approximate == "none":
        doubled = 1 + torch.erf(wide * math.sqrt(0.5))
    else:
        doubled = 1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    return (0.5 * wide * doubled).float()


def finish(values: Tensor, dtype: torch.dtype, out_dtype: torch.dtype | None) -> Tensor | tuple[Tensor, Tensor]:
    """float32 values as `dtype`, or as the codes and scales of `out_dtype`."""
    return values.to(dtype) if out_dtype is None else quantize_rows(values, out_dtype)


def as_rows(x: Tensor) -> Tensor:
    """x [..., width] as [num_rows, width] with stride 1 in a row; a copy only where a view cannot be."""
    strides = x.stride()
    if len(strides) == 2 and strides[1] == 1:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
