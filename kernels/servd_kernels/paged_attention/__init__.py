"""Owns causal attention over the paged cache (PagedAttention, Kwon et al. 2023, https://arxiv.org/abs/2309.06180).
Does not know requests: only rows, block tables and lengths, prefill and decode alike."""

import torch

from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

OP = Op("paged_attention")


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v for the keys that each row sees; float32 inside; [num_tokens, num_q_heads, head_dim].

    q [num_tokens, num_q_heads, head_dim]; kv_cache [num_blocks, 2, num_kv_heads, block_size, head_dim] of q's
    dtype; cu_seqlens_q [num_reqs + 1], seq_lens [num_reqs] (keys after this step) and block_tables [num_reqs,
    max_blocks] int32. Query i of n stands at position seq_len - n + i and sees keys 0..position, or the last
    sliding_window of them if that is > 0. A row's bits depend on that row alone; slots from seq_len on are
    never read. Raises ValueError for shapes, dtypes, lengths or block ids that do not fit.
    """
    if q.dim() != 3 or kv_cache.dim() != 5 or kv_cache.shape[1] != 2 or kv_cache.shape[4] != q.shape[2]:
        raise ValueError(f"kv_cache {list(kv_cache.shape)} does not fit q {list(q.shape)}")
    if q.shape[1] % kv_cache.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {kv_cache.shape[2]} kv heads")
    if kv_cache.dtype != q.dtype:
        raise ValueError(f"kv_cache must be {q.dtype} like q, not {kv_cache.dtype}")
    requests = len(seq_lens)
    for name, tensor, shape in (
        ("cu_seqlens_q", cu_seqlens_q, (requests + 1,)),
        ("seq_lens", seq_lens, (requests,)),
        ("block_tables", block_tables, (requests, block_tables.shape[-1])),
    ):
        if tensor.shape != shape or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 {shape}, not {tensor.dtype} {tuple(tensor.shape)}")
    check_last_stride(q=q, kv_cache=kv_cache, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens)
    run = OP.bind(q.device.type, q.dtype, backend, head_dim=q.shape[2])
    out: torch.Tensor = run(q, kv_cache, cu_seqlens_q, seq_lens, block_tables, scale, sliding_window)
    return out
