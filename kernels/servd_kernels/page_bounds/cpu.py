"""Owns the call of the native page bounds.
Does not know vectors or threads (cpu.cpp)."""

import torch

from servd_kernels import native
from servd_kernels.kv_format import KVFormat

_KERNEL = native.Function("page_bounds", "pplplpi")
_MAX_HEAD_DIM = 1024  # kMaxKvHeadDim of common/kv_side.hpp


def supports(device: str, dtype: torch.dtype, *, kv_format: KVFormat, **axes: object) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"bounds are float32 or bfloat16, not {dtype}"
    if kv_format.head_dim > _MAX_HEAD_DIM:
        return f"head_dim must be at most {_MAX_HEAD_DIM}, not {kv_format.head_dim}"
    return native.unsupported(device, dtype)


def run(
    kv_cache: torch.Tensor, kv_format: KVFormat, slot_mapping: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    num_blocks = len(kv_cache)
    fault = _KERNEL.call(
        kv_cache.data_ptr(), kv_format.native_layout.data_ptr(), num_blocks, slot_mapping.data_ptr(),
        len(slot_mapping), bounds.data_ptr(), native.DTYPES[bounds.dtype],
    )  # fmt: skip
    if fault:
        raise ValueError(f"slots must be in -1..{num_blocks * kv_format.block_size - 1}")
    return bounds
