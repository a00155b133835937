"""What attention must know of a packed batch.

Knows nothing of requests: a prefill chunk and a decode differ only in their number of query tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The layout of one step's batch; the same for all layers, on the model's device."""

    cu_seqlens_q: Tensor  # [num_reqs + 1] int32, where each request's tokens begin on the packed axis
    seq_lens: Tensor  # [num_reqs] int32, tokens of each request in the cache after this step
    block_tables: Tensor  # [num_reqs, max_blocks] int32, unused entries 0 (the null block)
    slot_mapping: Tensor  # [num_tokens] int64, block id * block size + offset; -1: the token is not written
