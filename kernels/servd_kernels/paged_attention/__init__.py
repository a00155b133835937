"""Owns causal attention over the paged cache (PagedAttention, Kwon et al. 2023, https://arxiv.org/abs/2309.06180).
Does not know requests: only rows, block tables and lengths, prefill and decode alike."""

import torch

from servd_kernels.kv_format import KVFormat
from servd_kernels.paged_attention.options import PLAIN, AttentionOptions
from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

__all__ = ["OP", "PLAIN", "AttentionOptions", "paged_attention"]

OP = Op("paged_attention")


def paged_attention(
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
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v for the keys that each row sees; float32 inside; [num_tokens, num_q_heads, head_dim].

    q [num_tokens, num_q_heads, head_dim] float32, bfloat16 or float16, rotated if the format's keys are; kv_cache
    [num_blocks, block_bytes] of kv_format (values that are stored rotated come out turned back); cu_seqlens_q
    [num_reqs + 1], seq_lens [num_reqs] (keys after this step) and block_tables [num_reqs, max_blocks] int32.
    Query i of n stands at position seq_len - n + i and sees the keys up to it, less what `options` hides.
    pages [num_reqs, num_kv_heads, max_pages] int32: only these pages (places in the block table, ascending, -1 after
    the last) are read; for requests of one query. return_lse: also the logarithm of the sum of exponentials
    [num_tokens, num_q_heads] float32 (sink_logits included), with which parts of an attention can be merged.
    A row's bits depend on that row alone; slots from seq_len on are never read. A row that sees no key is zero, with
    an lse of -inf. Raises ValueError for shapes, dtypes, lengths or block ids that do not fit.
    """
    kv_format.check(kv_cache)
    if q.dim() != 3 or kv_format.head_dim != q.shape[2]:
        raise ValueError(f"q must be [num_tokens, num_q_heads, {kv_format.head_dim}], not {list(q.shape)}")
    if q.shape[1] % kv_format.num_kv_heads:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {kv_format.num_kv_heads} kv heads")
    requests = len(seq_lens)
    for name, tensor, shape in (
        ("cu_seqlens_q", cu_seqlens_q, (requests + 1,)),
        ("seq_lens", seq_lens, (requests,)),
        ("block_tables", block_tables, (requests, block_tables.shape[-1])),
    ):
        if tensor.shape != shape or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 {shape}, not {tensor.dtype} {tuple(tensor.shape)}")
    if pages is not None:
        pages_shape = (requests, kv_format.num_kv_heads, pages.shape[-1])
        if pages.shape != pages_shape or pages.dtype != torch.int32 or not pages.is_contiguous():
            raise ValueError(f"pages must be contiguous int32 {pages_shape}, not {pages.dtype} {tuple(pages.shape)}")
        if len(q) != requests:
            raise ValueError(f"pages needs one query a request, not {len(q)} for {requests}")
    options.check(q.shape[1])
    check_last_stride(q=q, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens)
    run = OP.bind(q.device.type, q.dtype, backend, kv_format=kv_format, num_q_heads=q.shape[1])
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = run(
        q, kv_cache, kv_format, cu_seqlens_q, seq_lens, block_tables, scale, options, pages, return_lse
    )
    return out
