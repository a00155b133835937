"""Texts through a model and its paged cache, without an engine: hidden states of given tokens, greedy continuations.

Knows nothing of what is compared. Every text has blocks of its own; chunks are as a server would cut them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from servd.attention.kv_dtype import KVCacheDtype
from servd.attention.metadata import AttentionMetadata
from servd.models.base import Model

CHUNK = 512  # tokens of a prefill step
LOGIT_ROWS = 128  # rows of logits that are judged at a time: [rows, vocab_size] in float64


class PagedTexts:
    """Some texts of at most `max_len` tokens, in a cache that is bound to the model for this object's life."""

    def __init__(self, model: Model, kv_dtype: KVCacheDtype, num_texts: int, max_len: int) -> None:
        self.model = model
        self.block_size = kv_dtype.block_size
        self._blocks_per_text = -(-max_len // kv_dtype.block_size)
        self.formats = model.bind_kv_cache(kv_dtype)
        num_blocks = 1 + num_texts * self._blocks_per_text
        self._caches = [kv_format.allocate(num_blocks, model.device) for kv_format in self.formats]
        self._lengths = [0] * num_texts

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Each text's next tokens, [num_texts][n] → hidden states of all of them [num_tokens, hidden_size]."""
        flat: list[int] = []
        positions: list[int] = []
        slots, starts, tables = [], [0], []
        for text, tokens in enumerate(token_ids):
            first_block = 1 + text * self._blocks_per_text
            tables.append(range(first_block, first_block + self._blocks_per_text))
            new = range(self._lengths[text], self._lengths[text] + len(tokens))
            self._lengths[text] += len(tokens)
            flat += tokens
            positions += new
            slots += [first_block * self.block_size + position for position in new]
            starts.append(len(flat))

        def tensor(values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.model.device)

        metadata = AttentionMetadata(
            cu_seqlens_q=tensor(starts, torch.int32),
            seq_lens=tensor(self._lengths, torch.int32),
            block_tables=tensor([list(table) for table in tables], torch.int32),
            slot_mapping=tensor(slots, torch.int64),
        )
        ids, at = tensor(flat, torch.int64), tensor(positions, torch.int64)
        return self.model.forward(ids, at, metadata, self._caches)

    @torch.inference_mode()
    def continue_greedily(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The `num_tokens` greedy tokens after each prompt (of at least one token): [num_texts][num_tokens]."""
        hidden = self.extend(prompts)
        ends = torch.tensor([len(prompt) for prompt in prompts], device=hidden.device).cumsum(0) - 1
        answers: list[list[int]] = [[] for _ in prompts]
        hidden = hidden[ends]
        while True:
            best = self.model.compute_logits(hidden).argmax(-1).tolist()
            for answer, token in zip(answers, best, strict=True):
                answer.append(token)
            if len(answers[0]) == num_tokens:
                return answers
            hidden = self.extend([[token] for token in best])


def hidden_states(model: Model, kv_dtype: KVCacheDtype, token_ids: Sequence[int], context: int) -> Tensor:
    """Hidden states of a long text, cut into contexts that do not see each other: [num_tokens, hidden_size]."""
    parts = []
    for begin in range(0, len(token_ids), context):
        window = token_ids[begin : begin + context]
        texts = PagedTexts(model, kv_dtype, 1, len(window))
        parts += [texts.extend([window[at : at + CHUNK]]) for at in range(0, len(window), CHUNK)]
    return torch.cat(parts)


def judged_rows(token_ids: Sequence[int], context: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """LOGIT_ROWS rows of `hidden_states` at a time, and the tokens that follow them in their context: [n], [n]."""
    judged = [i for i in range(len(token_ids) - 1) if (i + 1) % context != 0]
    following = [token_ids[i + 1] for i in judged]
    rows, targets = torch.tensor(judged, device=device), torch.tensor(following, device=device)
    return zip(torch.split(rows, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True)
