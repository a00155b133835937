"""Shadow comparison: now and then one request of a step is computed again from its tokens, with an unquantized cache.

Owns the scratch cache. Knows nothing of who reads the result; the request's own answer is not touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from servd.attention.kv_dtype import KVCacheDtype
from servd.attention.metadata import AttentionMetadata
from servd.models.base import Model
from servd.outputs import KVShadowSample

MAX_TOKENS = 1024  # of a request that is compared: a shadow costs a prefill of all its tokens


class KVShadow:
    """Compares next-token distributions under the cache in use and under one in the compute dtype."""

    def __init__(self, model: Model, kv_dtype: KVCacheDtype, rate: float) -> None:
        """`rate`: share of steps that are compared, 0 to 1."""
        self._model = model
        self._kv_dtype = kv_dtype
        self._rate = rate
        self._caches: list[Tensor] = []

    def is_due(self, step_id: int) -> bool:
        """Whether this step is one of the share: evenly spaced."""
        return int((step_id + 1) * self._rate) > int(step_id * self._rate)

    def compare(self, token_ids: list[int], logits: Tensor) -> KVShadowSample:
        """`logits` [vocab_size]: what the step gave after `token_ids`, of which there are at most MAX_TOKENS."""
        full = self._full_logits(token_ids).double().log_softmax(-1)
        served = logits.double().log_softmax(-1)
        return KVShadowSample(
            kl_divergence=float((full.exp() * (full - served)).sum()),
            is_top1_equal=bool(full.argmax() == served.argmax()),
            num_tokens=len(token_ids),
        )

    def _full_logits(self, token_ids: list[int]) -> Tensor:
        device, block_size, count = self._model.device, self._kv_dtype.block_size, len(token_ids)
        num_blocks = -(-MAX_TOKENS // block_size)
        formats = self._model.bind_kv_cache(self._kv_dtype.plain())
        try:
            if not self._caches:
                self._caches = [kv_format.allocate(num_blocks + 1, device) for kv_format in formats]
            metadata = AttentionMetadata(
                cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32, device=device),
                seq_lens=torch.tensor([count], dtype=torch.int32, device=device),
                block_tables=torch.arange(1, num_blocks + 1, dtype=torch.int32, device=device).unsqueeze(0),
                slot_mapping=torch.arange(count, device=device) + block_size,
            )
            ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
            hidden = self._model.forward(ids, torch.arange(count, device=device), metadata, self._caches)
            return self._model.compute_logits(hidden[-1:])[0]
        finally:
            self._model.bind_kv_cache(self._kv_dtype)
