"""Owns the call of the native gate.
Does not know vectors or threads (cpu.cpp)."""

import torch

from servd_kernels import native

_KERNEL = native.Function("silu_and_mul", "plplli")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def run(x: torch.Tensor) -> torch.Tensor:
    *outer, last = x.shape
    width = last // 2
    out = torch.empty(*outer, width, dtype=x.dtype)
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous().view(-1, last)
    _KERNEL.call(x.data_ptr(), x.stride(0), out.data_ptr(), x.shape[0], width, native.DTYPES[x.dtype])
    return out
