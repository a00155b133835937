"""Rotates q and k, writes k and v to their slots, and attends over the cache: two kernels, bound once.

Knows nothing of projections; the KV cache comes as an argument.
"""

from __future__ import annotations

import torch
from servd_kernels import paged_attention, rope_and_cache
from torch import Tensor

from servd.attention.metadata import AttentionMetadata


class Attention:
    """Causal attention of `num_heads` query heads over `num_kv_heads` heads, both counted on this rank."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        cos_sin: Tensor,
        sliding_window: int = 0,
    ) -> None:
        """`cos_sin`: [max_position, rotary_dim] float32, cosines then sines; may be filled later, in place.

        `sliding_window`: how many keys a token sees, itself included; 0: all before it.
        """
        self._rope_and_cache, self._paged_attention = (
            op.bind(device=device.type, dtype=dtype, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
            for op in (rope_and_cache.OP, paged_attention.OP)
        )
        self._cos_sin = cos_sin
        self._scale = head_dim**-0.5
        self._sliding_window = sliding_window

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, metadata: AttentionMetadata, kv_cache: Tensor
    ) -> Tensor:
        """Attend with q [num_tokens, num_heads, head_dim] over the cache, k and v of this step included.

        k, v: [num_tokens, num_kv_heads, head_dim]; positions: [num_tokens] int64;
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim], written in place. q is rotated in place.
        Returns [num_tokens, num_heads, head_dim].
        """
        q = self._rope_and_cache(q, k, v, positions, self._cos_sin, metadata.slot_mapping, kv_cache)
        output: Tensor = self._paged_attention(
            q,
            kv_cache,
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            metadata.block_tables,
            self._scale,
            self._sliding_window,
        )
        return output
