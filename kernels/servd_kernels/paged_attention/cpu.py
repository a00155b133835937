"""Owns the call of the native paged attention.
Does not know its schedule (cpu.cpp) or arithmetic (span.hpp)."""

import torch

from servd_kernels import native
from servd_kernels.kv_format import KVFormat
from servd_kernels.paged_attention.faults import FAULTS
from servd_kernels.paged_attention.options import PLAIN, AttentionOptions

_KERNEL = native.Function("paged_attention", "pllpllllpppllllllllflpi")
_MAX_HEAD_DIM = 256  # kMaxHeadDim of span.hpp


def supports(device: str, dtype: torch.dtype, *, kv_format: KVFormat, **axes: object) -> str | None:
    if kv_format.k.code.dtype != dtype or kv_format.v.code.dtype != dtype or kv_format.key_words:
        return f"it reads rows of {dtype}, not {kv_format.key} keys and {kv_format.value} values"
    if kv_format.head_dim > _MAX_HEAD_DIM:
        return f"head_dim must be at most {_MAX_HEAD_DIM}, not {kv_format.head_dim}"
    return native.unsupported(device, dtype)


def run(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    kv_format: KVFormat,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    options: AttentionOptions = PLAIN,
    pages: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    num_tokens, q_heads, head_dim = q.shape
    num_blocks, kv_heads, block_size = len(kv_cache), kv_format.num_kv_heads, kv_format.block_size
    num_reqs, max_blocks = block_tables.shape
    q_token, q_head, _ = q.stride()
    block_stride, head_stride = kv_format.block_bytes // q.itemsize, kv_format.head_bytes // q.itemsize
    kv_stride, token_stride = block_size * head_dim, head_dim
    window = options.sliding_window
    if not block_tables.is_contiguous():
        block_tables = block_tables.contiguous()
    out = torch.empty(num_tokens, q_heads, head_dim, dtype=q.dtype)
    fault = _KERNEL.call(
        q.data_ptr(), q_token, q_head, kv_cache.data_ptr(), block_stride, kv_stride, head_stride,
        token_stride, cu_seqlens_q.data_ptr(), seq_lens.data_ptr(), block_tables.data_ptr(), max_blocks,
        num_reqs, num_tokens, q_heads, kv_heads, num_blocks, block_size, head_dim, scale, window,
        out.data_ptr(), native.DTYPES[q.dtype],
    )  # fmt: skip
    if fault:
        raise ValueError(FAULTS[fault])
    return out
