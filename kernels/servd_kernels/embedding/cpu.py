"""Owns the call of the native look-up, which a recorded step can hold where torch's own cannot.
Does not know how rows are copied (cpu.cpp)."""

import torch

from servd_kernels import native

_KERNEL = native.Function("embedding", "pplplll")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def run(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    rows, hidden = table.shape
    out = torch.empty(len(ids), hidden, dtype=table.dtype)
    size = table.element_size()
    if _KERNEL.call(
        ids.data_ptr(), table.data_ptr(), table.stride(0) * size, out.data_ptr(), len(ids), rows, hidden * size
    ):
        raise IndexError(f"ids must be in 0..{rows - 1}")
    return out
