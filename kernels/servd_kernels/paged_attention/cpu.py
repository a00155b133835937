"""Owns the call of the native paged attention.
Does not know its schedule (cpu.cpp) or arithmetic (span.hpp)."""

import torch

from servd_kernels import native
from servd_kernels.paged_attention.faults import FAULTS

_KERNEL = native.Function("paged_attention", "pllpllllpppllllllllflpi")
_MAX_HEAD_DIM = 256  # kMaxHeadDim of span.hpp


def supports(device: str, dtype: torch.dtype, head_dim: int = 64, **axes: int) -> str | None:
    if head_dim % 8 or head_dim > _MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {_MAX_HEAD_DIM}, not {head_dim}"
    return native.unsupported(device, dtype)


def run(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    num_tokens, q_heads, head_dim = q.shape
    num_blocks, _, kv_heads, block_size, _ = kv_cache.shape
    num_reqs, max_blocks = block_tables.shape
    q_token, q_head, _ = q.stride()
    block_stride, kv_stride, head_stride, token_stride, _ = kv_cache.stride()
    if not block_tables.is_contiguous():
        block_tables = block_tables.contiguous()
    out = torch.empty(num_tokens, q_heads, head_dim, dtype=q.dtype)
    fault = _KERNEL.call(
        q.data_ptr(), q_token, q_head, kv_cache.data_ptr(), block_stride, kv_stride, head_stride,
        token_stride, cu_seqlens_q.data_ptr(), seq_lens.data_ptr(), block_tables.data_ptr(), max_blocks,
        num_reqs, num_tokens, q_heads, kv_heads, num_blocks, block_size, head_dim, scale, sliding_window,
        out.data_ptr(), native.DTYPES[q.dtype],
    )  # fmt: skip
    if fault:
        raise ValueError(FAULTS[fault])
    return out
