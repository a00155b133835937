"""Owns what is said of arrays that do not fit each other, so that all backends say the same.
Does not know how a backend finds out: the codes are those of `check` in cpu.cpp."""

import torch

FAULTS = {
    1: "cu_seqlens_q must rise from 0 to num_tokens",
    2: "a seq_len is smaller than its number of queries",
    3: "block_tables has too few columns for a seq_len",
    4: "block_tables holds an id outside the cache",
}


def find_fault(
    num_tokens: int,
    kv_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    sliding_window: int,
) -> int:
    """0, or the first fault's code."""
    num_blocks, _, _, block_size, _ = kv_cache.shape
    starts = cu_seqlens_q.tolist()
    if starts[0] != 0 or starts[-1] != num_tokens or starts != sorted(starts):
        return 1
    for request, length in enumerate(seq_lens.tolist()):
        count = starts[request + 1] - starts[request]
        if length < count:
            return 2
        blocks = -(-length // block_size)
        if blocks > block_tables.shape[1]:
            return 3
        first = max(0, length - count + 1 - sliding_window) if sliding_window > 0 else 0
        used = block_tables[request, first // block_size : blocks]
        if count and bool(((used < 0) | (used >= num_blocks)).any()):
            return 4
    return 0
