"""Owns the plain torch paged attention that every backend is held to.
Does not know speed: it works row by row, so that a row's bits do not depend on the batch."""

import math
from typing import Any

import torch

from servd_kernels.kv_format import KVFormat, hadamard
from servd_kernels.paged_attention.faults import FAULTS, find_fault
from servd_kernels.paged_attention.options import PLAIN, AttentionOptions


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


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
    fault = find_fault(len(q), len(kv_cache), kv_format, cu_seqlens_q, seq_lens, block_tables, options, pages)
    if fault:
        raise ValueError(FAULTS[fault])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    starts = cu_seqlens_q.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        first, end = starts[request], starts[request + 1]
        for row in range(first, end):
            position = length - end + row
            chosen = None if pages is None else pages[request]
            out[row], lse[row] = _attend(
                q[row].float(), kv_cache, kv_format, block_tables[request], position, scale, options, chosen
            )
    return (out, lse) if return_lse else out


def _attend(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    kv_format: KVFormat,
    table: torch.Tensor,
    position: int,
    scale: float,
    options: AttentionOptions,
    pages: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: q [num_q_heads, head_dim], table [max_blocks], pages [num_kv_heads, max_pages]
    -> out [num_q_heads, head_dim], lse [num_q_heads]."""
    heads, size = kv_format.num_kv_heads, kv_format.block_size
    keys = torch.arange(position + 1, device=q.device)
    if options.sliding_window:
        keys = keys[(keys > position - options.sliding_window) | (keys < options.num_sink_tokens)]
    slots = table[keys // size].long() * size + keys % size
    k = kv_format.read(kv_cache, kv_format.k, slots)  # [num_keys, num_kv_heads, head_dim]
    v = kv_format.read(kv_cache, kv_format.v, slots)
    if options.logn_train_len:
        q = q * max(1.0, math.log(position + 1) / math.log(options.logn_train_len))
    grouped = q.view(heads, -1, q.shape[-1])
    scores = (torch.einsum("hgd,thd->hgt", grouped, k) * scale).flatten(0, 1)  # [num_q_heads, num_keys]
    if options.alibi_slopes is not None:
        scores = scores + options.alibi_slopes[:, None] * (keys - position)
    if options.logit_softcap:
        scores = options.logit_softcap * torch.tanh(scores / options.logit_softcap)
    if pages is not None:  # what was not chosen may hold anything
        is_chosen = (pages[:, :, None] == keys // size).any(1)  # [num_kv_heads, num_keys]
        scores = scores.masked_fill(~is_chosen.repeat_interleave(len(q) // heads, 0), -torch.inf)
        v = v.masked_fill(~is_chosen.T[:, :, None], 0.0)
    logits = scores
    if options.sink_logits is not None:
        logits = torch.cat([scores, options.sink_logits[:, None]], -1)
    lse = torch.logsumexp(logits, -1)
    weights = torch.where(lse[:, None] == -torch.inf, 0.0, torch.exp(scores - lse[:, None]))
    out = torch.einsum("hgt,thd->hgd", weights.view(heads, -1, len(keys)), v).reshape(q.shape)
    return (hadamard(out) if kv_format.v.code.is_rotated else out), lse


def make_inputs(
    query_lens: list[int],
    seq_lens: list[int],
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    key: str | None = None,
    value: str | None = None,
    key_words: bool = False,
    options: AttentionOptions = PLAIN,
    seed: int = 0,
) -> dict[str, Any]:
    """Blocks lie shuffled; all bytes that belong to no key are 0xFF (NaN in every float); the rest of a table is
    block 0. Keys and queries do not depend on the block size. `key` and `value` are codes; None: as `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    placement = torch.Generator().manual_seed(seed)
    name = str(dtype).removeprefix("torch.")
    kv_format = KVFormat(key or name, value or name, num_kv_heads, head_dim, block_size, key_words)
    counts = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(counts) + 2
    ids = 1 + torch.randperm(num_blocks - 1, generator=placement)
    cache = torch.full((num_blocks, kv_format.block_bytes), 0xFF, dtype=torch.uint8)
    tables = torch.zeros(len(seq_lens), max(counts, default=0) + 1, dtype=torch.int32)
    taken = 0
    for request, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        tables[request, :count] = ids[taken : taken + count]
        taken += count
        slots = torch.arange(length)
        places = tables[request].long()[slots // block_size] * block_size + slots % block_size
        for side in (kv_format.k, kv_format.v):
            values = torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype)
            kv_format.write(cache, side, places, values)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    q = torch.randn(sum(query_lens), num_q_heads, head_dim, generator=generator).to(dtype)
    return {
        "q": q,
        "kv_cache": cache,
        "kv_format": kv_format,
        "cu_seqlens_q": starts,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "block_tables": tables,
        "scale": head_dim**-0.5,
        "options": options,
    }
