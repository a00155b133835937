"""A model without weights: its logits are a hash of all tokens before, read back through the paged cache.

Whatever goes wrong with slots, block tables, positions or copies changes its tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from servd_kernels.kv_format import KVFormat
from torch import Tensor

from servd.attention.metadata import AttentionMetadata
from servd.worker.drafter import Drafter
from servd.worker.kv_cache import PagedKVCache
from servd.worker.model_runner import ModelRunner

PRIME = 65_521
NAN_TOKEN = 13  # a sequence that holds it has NaN logits


class FakeModel:
    vocab_size = 101
    num_layers = 1
    num_kv_heads = 1
    head_dim = 8

    def __init__(self) -> None:
        self.batch_sizes: list[tuple[int, int]] = []  # tokens and requests of each step
        self.logit_rows: list[int] = []  # rows of each compute_logits
        self.fail_next = False

    def forward(
        self, input_ids: Tensor, positions: Tensor, attention: AttentionMetadata, kv_caches: list[Tensor]
    ) -> Tensor:
        """Returns [num_tokens, 2]: the hash, and whether NAN_TOKEN came before."""
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("out of memory, say")
        (cache,) = kv_caches
        keys = cache.view(torch.float32)[:, : cache.shape[1] // 8].unflatten(1, (-1, self.head_dim))
        block_size = keys.shape[1]
        for token, position, slot in zip(input_ids, positions, attention.slot_mapping, strict=True):
            keys[slot // block_size, slot % block_size, :2] = torch.stack([token, position]).to(keys.dtype)
        bounds = attention.cu_seqlens_q.tolist()
        self.batch_sizes.append((len(input_ids), len(bounds) - 1))
        hidden = torch.zeros(len(input_ids), 2, dtype=torch.float64)
        for i, length in enumerate(attention.seq_lens.tolist()):
            num_blocks = -(-length // block_size)
            blocks = attention.block_tables[i, :num_blocks].long()
            past = keys[blocks, :, :2].reshape(-1, 2)[:length].long()
            for index in range(bounds[i], bounds[i + 1]):
                seen = past[: int(positions[index]) + 1]
                value = 0
                for token, position in seen.tolist():
                    value = (value * 31 + token * 7 + position + 1) % PRIME
                hidden[index, 0] = value
                hidden[index, 1] = float(NAN_TOKEN in seen[:, 0].tolist())
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.logit_rows.append(len(hidden))
        ids = torch.arange(1, self.vocab_size + 1, dtype=torch.float64)
        logits = ((hidden[:, :1] + 1) * ids * 7919 % PRIME / PRIME * 6).to(torch.float32)
        logits[hidden[:, 1] > 0] = torch.nan
        return logits


def make_runner(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_model_len: int = 64,
    drafter: Drafter | None = None,
    tokenizer_path: Path | None = None,
) -> ModelRunner:
    device = torch.device("cpu")
    cache = PagedKVCache([KVFormat("float32", "float32", 1, FakeModel.head_dim, block_size)], num_blocks, device)
    for layer in cache.layers:
        layer.fill_(0xFF)  # what nobody wrote is NaN, and must never be read
    return ModelRunner(
        FakeModel(), cache, max_num_seqs=max_num_seqs, max_model_len=max_model_len, device=device, drafter=drafter,
        tokenizer_path=tokenizer_path,
    )  # fmt: skip
