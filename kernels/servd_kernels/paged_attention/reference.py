"""Owns the plain torch paged attention that every backend is held to.
Does not know speed: it works row by row, so that a row's bits do not depend on the batch."""

from typing import Any

import torch

from servd_kernels.paged_attention.faults import FAULTS, find_fault


def supports(device: str, dtype: torch.dtype, **axes: int) -> str | None:
    return None


def run(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    fault = find_fault(len(q), kv_cache, cu_seqlens_q, seq_lens, block_tables, sliding_window)
    if fault:
        raise ValueError(FAULTS[fault])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts = cu_seqlens_q.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        first, end = starts[request], starts[request + 1]
        for row in range(first, end):
            position = length - end + row
            begin = max(0, position + 1 - sliding_window) if sliding_window > 0 else 0
            keys = torch.arange(begin, position + 1, device=q.device)
            out[row] = _attend(q[row], kv_cache, block_tables[request], keys, scale)
    return out


def _attend(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """q [num_q_heads, head_dim]; table [max_blocks]; positions [keys] -> [num_q_heads, head_dim]."""
    _, _, kv_heads, block_size, head_dim = kv_cache.shape
    blocks = table[positions // block_size].long()
    k, v = kv_cache[blocks, :, :, positions % block_size].float().unbind(1)  # [keys, kv_heads, head_dim]
    grouped = q.float().view(kv_heads, -1, head_dim)
    weights = torch.softmax(torch.einsum("hgd,thd->hgt", grouped, k) * scale, -1)
    return torch.einsum("hgt,thd->hgd", weights, v).reshape(q.shape).to(q.dtype)


def make_inputs(
    query_lens: list[int],
    seq_lens: list[int],
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    sliding_window: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Blocks lie shuffled; every slot that belongs to no key is NaN; the rest of a table is block 0. The keys
    and queries do not depend on the block size."""
    generator = torch.Generator().manual_seed(seed)
    placement = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(counts) + 2
    ids = 1 + torch.randperm(num_blocks - 1, generator=placement)
    cache = torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    tables = torch.zeros(len(seq_lens), max(counts, default=0) + 1, dtype=torch.int32)
    taken = 0
    for request, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        tables[request, :count] = ids[taken : taken + count]
        taken += count
        slots = torch.arange(length)
        values = torch.randn(length, 2, num_kv_heads, head_dim, generator=generator).to(dtype)
        blocks = tables[request].long()[slots // block_size]
        cache[blocks, :, :, slots % block_size] = values
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    q = torch.randn(sum(query_lens), num_q_heads, head_dim, generator=generator).to(dtype)
    return {
        "q": q,
        "kv_cache": cache,
        "cu_seqlens_q": starts,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "block_tables": tables,
        "scale": head_dim**-0.5,
        "sliding_window": sliding_window,
    }
