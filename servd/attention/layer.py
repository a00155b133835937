"""Rotates q and k, writes k and v to their slots, and attends over the cache: two kernels, bound to its format.

Knows nothing of projections; the KV cache comes as an argument.
"""

from __future__ import annotations

import torch
from servd_kernels import native, paged_attention, rope_and_cache
from servd_kernels.key_order import key_order
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
        self._key_energy: Tensor | None = None  # [num_kv_heads, head_dim] while keys are observed
        self._key_order: Tensor | None = None  # [num_kv_heads, head_dim], once they were

    def bind_kv_cache(self, kv_format: KVFormat) -> None:
        """Choose the kernels for a cache of this format; before the first call, and whenever the format changes."""
        self._format = kv_format
        self._rope_and_cache, self._paged_attention = (
            op.bind(self._device.type, self._dtype, kv_format=kv_format, num_q_heads=self._num_heads)
            for op in (rope_and_cache.OP, paged_attention.OP)
        )

    @property
    def has_key_order(self) -> bool:
        """Whether keys were observed, so that they can be stored in four bits."""
        return self._key_order is not None

    def observe_keys(self) -> None:
        """Begin to measure how strong each dimension of the keys is, until `order_keys`."""
        self._key_energy = torch.zeros(self.num_kv_heads, self.head_dim, device=self._device)

    def order_keys(self, group: int) -> None:
        """End the measurement; codes of groups of so many dimensions store keys in the order found."""
        assert self._key_energy is not None, "order_keys without observe_keys"
        energy, rotary_dim = self._key_energy.cpu(), self._cos_sin.shape[1]
        self._key_order = key_order(energy, rotary_dim, interleaved=False, group=group).to(self._device)
        self._key_energy = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, metadata: AttentionMetadata, kv_cache: Tensor
    ) -> Tensor:
        """Attend with q [num_tokens, num_heads, head_dim] over the cache, k and v of this step included.

        k, v: [num_tokens, num_kv_heads, head_dim]; positions: [num_tokens] int64;
        kv_cache: [num_blocks, block_bytes] of the bound format, written in place. q is rotated in place.
        Returns [num_tokens, num_heads, head_dim].
        """
        if self._key_energy is not None:
            self._key_energy += k.float().square().sum(0)
        q = self._rope_and_cache(
            q, k, v, positions, self._cos_sin, metadata.slot_mapping, kv_cache, self._format, False, self._key_order
        )
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


def reads_key_words(device: torch.device) -> bool:
    """Whether the kernels of this device want keys in words (see KVFormat): the native ones of a CPU do."""
    return device.type == "cpu" and native.library() is not None
