"""Rotates q and k, writes k and v to their slots, and attends over the cache: two kernels, bound to its format.

Knows nothing of projections; the KV cache comes as an argument.
"""

from __future__ import annotations

import torch
from servd_kernels import paged_attention, rope_and_cache
from servd_kernels.kv_format import KVFormat
from servd_kernels.paged_attention import AttentionOptions
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
        self._dtype, self._device = dtype, device
        self._num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self._cos_sin = cos_sin
        self._scale = head_dim**-0.5
        self._options = AttentionOptions(sliding_window=sliding_window)

    def bind_kv_cache(self, kv_format: KVFormat) -> None:
        """Choose the kernels for a cache of this format; before the first call, and whenever the format changes."""
        self._format = kv_format
        self._rope_and_cache, self._paged_attention = (
            op.bind(self._device.type, self._dtype, kv_format=kv_format, num_q_heads=self._num_heads)
            for op in (rope_and_cache.OP, paged_attention.OP)
        )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, metadata: AttentionMetadata, kv_cache: Tensor
    ) -> Tensor:
        """Attend with q [num_tokens, num_heads, head_dim] over the cache, k and v of this step included.

        k, v: [num_tokens, num_kv_heads, head_dim]; positions: [num_tokens] int64;
        kv_cache: [num_blocks, block_bytes] of the bound format, written in place. q is rotated in place.
        Returns [num_tokens, num_heads, head_dim].
        """
        q = self._rope_and_cache(q, k, v, positions, self._cos_sin, metadata.slot_mapping, kv_cache, self._format)
        output: Tensor = self._paged_attention(
            q,
            kv_cache,
            self._format,
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            metadata.block_tables,
            self._scale,
            self._options,
        )
        return output
