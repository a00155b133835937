"""Token embedding and the output head, split by vocabulary; a tied head shares the embedding's weight.

Knows nothing of tokenizers or sampling.
"""

from __future__ import annotations

from typing import cast

import torch
from servd_kernels import linear
from torch import Tensor
from torch.nn import functional

from servd.layers.base import Layer, LayerContext, WeightSlot


class VocabEmbedding(Layer):
    """Rows of the vocabulary; ranks hold equal runs of them, the last one padded with zeros."""

    def __init__(self, context: LayerContext, name: str, vocab_size: int, hidden_size: int) -> None:
        self._name = name
        self._group = context.group
        self.vocab_size = vocab_size
        self.num_rows = -(-vocab_size // context.group.size)
        self._first = context.group.rank * self.num_rows
        # [num_rows, hidden_size]
        self.weight = torch.zeros(self.num_rows, hidden_size, dtype=context.dtype, device=context.device)

    def weight_slots(self) -> dict[str, WeightSlot]:
        return {f"{self._name}.weight": WeightSlot((self.vocab_size, self.weight.shape[1]), self._load)}

    def _load(self, tensor: Tensor) -> None:
        kept = tensor[self._first : self._first + self.num_rows]
        self.weight[: kept.shape[0]].copy_(kept)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids [num_tokens] int64 → [num_tokens, hidden_size]."""
        if self._group.size == 1:
            return functional.embedding(input_ids, self.weight)
        rows = input_ids - self._first
        elsewhere = (rows < 0) | (rows >= self.num_rows)
        hidden = functional.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return self._group.all_reduce(hidden.masked_fill(elsewhere.unsqueeze(-1), 0))


class LMHead(Layer):
    """Hidden states to logits. With `tied_to`, the checkpoint needs no weight of its own.

    Where the linear kernel packs into its own layout, a tied weight is held twice: once for rows, once packed.
    """

    def __init__(
        self,
        context: LayerContext,
        name: str,
        vocab_size: int,
        hidden_size: int,
        *,
        tied_to: VocabEmbedding | None = None,
    ) -> None:
        self._name = name
        self._group = context.group
        self._vocab_size = vocab_size
        self._tied = tied_to is not None
        self._rows: VocabEmbedding | None = tied_to or VocabEmbedding(context, name, vocab_size, hidden_size)
        self._linear = cast(linear.BoundLinear, linear.OP.bind(device=context.device.type, dtype=context.dtype))

    def weight_slots(self) -> dict[str, WeightSlot]:
        assert self._rows is not None, "loaded after finish_loading"
        if not self._tied:
            return self._rows.weight_slots()
        # Some checkpoints hold a second copy of the tied weight.
        shape = (self._vocab_size, self._rows.weight.shape[1])
        return {f"{self._name}.weight": WeightSlot(shape, lambda tensor: None, required=False)}

    def finish_loading(self) -> None:
        assert self._rows is not None, "finish_loading called twice"
        self._packed = self._linear.pack(self._rows.weight)
        self._rows = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size] → logits [num_rows, vocab_size] float32, the same on every rank."""
        # Rounded to bfloat16, logits near 20 would lie 0.125 apart, and near ties would be decided by chance.
        logits = self._linear(hidden, self._packed, out_dtype=torch.float32)
        if self._group.size > 1:
            logits = self._group.all_gather(logits)[:, : self._vocab_size]
        return logits
