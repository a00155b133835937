"""Owns the call of the native choice of pages.
Does not know vectors or threads (cpu.cpp)."""

import torch

from servd_kernels import native
from servd_kernels.kv_format import KVFormat
from servd_kernels.select_pages.reference import FAULTS

_KERNEL = native.Function("select_pages", "plllllplppllllpii")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def run(
    q: torch.Tensor,
    bounds: torch.Tensor,
    kv_format: KVFormat,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    num_reqs, q_heads, head_dim = q.shape
    kv_heads = kv_format.num_kv_heads
    q_token, q_head, _ = q.stride()
    pages = torch.empty(num_reqs, kv_heads, top_k, dtype=torch.int32)
    fault = _KERNEL.call(
        q.data_ptr(), q_token, q_head, q_heads, kv_heads, head_dim, bounds.data_ptr(), len(bounds),
        seq_lens.data_ptr(), block_tables.data_ptr(), block_tables.shape[1], num_reqs, kv_format.block_size, top_k,
        pages.data_ptr(), native.DTYPES[q.dtype], native.DTYPES[bounds.dtype],
    )  # fmt: skip
    if fault:
        raise ValueError(FAULTS[fault])
    return pages
