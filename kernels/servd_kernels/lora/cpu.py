"""Owns the call of the native low-rank update.
Does not know vectors or threads (cpu.cpp)."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch

from servd_kernels import native

_KERNEL = native.Function("lora", "plplpppppplllllli")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def run(
    y: torch.Tensor,
    x: torch.Tensor,
    adapter_ids: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scalings: torch.Tensor,
    slices: Sequence[int],
) -> None:
    adapters, parts, max_rank, depth = a.shape
    rows, columns = y.shape
    ends = (ctypes.c_int64 * parts)(*accumulate(slices))
    _KERNEL.call(
        y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), adapter_ids.data_ptr(), a.data_ptr(), b.data_ptr(),
        ranks.data_ptr(), scalings.data_ptr(), ctypes.addressof(ends), rows, depth, columns, adapters, max_rank, parts,
        native.DTYPES[y.dtype],
    )  # fmt: skip
