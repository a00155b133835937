"""Owns what is said of arrays that do not fit each other, so that all backends say the same.
Does not know how a backend finds out: the codes are those of `check` in cpu.cpp."""

import torch

from servd_kernels.kv_format import KVFormat
from servd_kernels.paged_attention.options import AttentionOptions

FAULTS = {
    1: "cu_seqlens_q must rise from 0 to num_tokens",
    2: "a seq_len is smaller than its number of queries",
    3: "block_tables has too few columns for a seq_len",
    4: "block_tables holds an id outside the cache",
    5: "pages must ascend, below the request's number of blocks, with -1 after the last",
}


def find_fault(
    num_tokens: int,
    num_blocks: int,
    kv_format: KVFormat,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    options: AttentionOptions,
    pages: torch.Tensor | None,
) -> int:
    """0, or the first fault's code. Reads the arrays on the host: on a GPU that waits for the device."""
    size, window = kv_format.block_size, options.sliding_window
    starts = cu_seqlens_q.tolist()
    if starts[0] != 0 or starts[-1] != num_tokens or starts != sorted(starts):
        return 1
    for request, length in enumerate(seq_lens.tolist()):
        count = starts[request + 1] - starts[request]
        if length < count:
            return 2
        blocks = -(-length // size)
        if blocks > block_tables.shape[1]:
            return 3
        first = max(0, length - count + 1 - window) if window > 0 else 0
        sinks = min(first, options.num_sink_tokens)
        used = torch.cat(
            [block_tables[request, : -(-sinks // size)], block_tables[request, first // size : blocks]]
        )
        if count and bool(((used < 0) | (used >= num_blocks)).any()):
            return 4
        if pages is not None:
            for chosen in pages[request].tolist():
                kept = [page for page in chosen if page >= 0]
                if chosen[: len(kept)] != kept or kept != sorted(set(kept)) or (kept and kept[-1] >= blocks):
                    return 5
    return 0
