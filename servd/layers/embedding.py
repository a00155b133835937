"""Token embedding and the output head, split by vocabulary; a tied head shares the embedding's weight.

Knows nothing of tokenizers or sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from servd_kernels import embedding, linear
from torch import Tensor

from servd.layers.base import Layer, LayerContext, WeightSlot


class VocabEmbedding(Layer):
    """Rows of the vocabulary; ranks hold equal runs of them, the last one padded with zeros."""

    def __init__(self, context: LayerContext, name: str, vocab_size: int, hidden_size: int) -> None:
        self._name = name
        self._group = context.group
        self.vocab_size = vocab_size
        self.num_rows = -(-vocab_size // context.group.size)
        self._first = context.group.rank * self.num_rows
        self.hidden_size = hidden_size
        # [num_rows, hidden_size] until a head that shares it has packed it
        self._weight: Tensor | None = torch.zeros(
            self.num_rows, hidden_size, dtype=context.dtype, device=context.device
        )
        look_up = embedding.OP.bind(device=context.device.type, dtype=context.dtype)
        self._rows: Callable[[Tensor], Tensor] = partial(look_up, table=self._weight)

    def weight_slots(self) -> dict[str, WeightSlot]:
        return {f"{self._name}.weight": WeightSlot((self.vocab_size, self.hidden_size), self._load)}

    def _load(self, tensor: Tensor) -> None:
        assert self._weight is not None, "loaded after pack"
        kept = tensor[self._first : self._first + self.num_rows]
        self._weight[: kept.shape[0]].copy_(kept)

    def pack(self, bound: linear.BoundLinear) -> linear.PackedWeight:
        """The weight packed for a head's product; from now on the rows come out of that form, which alone is kept."""
        assert self._weight is not None, "packed twice"
        packed = bound.pack(self._weight)
        self._weight, self._rows = None, packed.rows
        return packed

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids [num_tokens] int64 → [num_tokens, hidden_size]."""
        if self._group.size == 1:
            return self._rows(input_ids)
        rows = input_ids - self._first
        elsewhere = (rows < 0) | (rows >= self.num_rows)
        hidden = self._rows(rows.masked_fill(elsewhere, 0))
        return self._group.all_reduce(hidden.masked_fill(elsewhere.unsqueeze(-1), 0))


class LMHead(Layer):
    """Hidden states to logits. With `tied_to`, the checkpoint needs no weight of its own, and memory holds one."""

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
        bound = linear.OP.bind(device=context.device.type, dtype=context.dtype, deterministic=context.deterministic)
        self._linear = cast(linear.BoundLinear, bound)

    def weight_slots(self) -> dict[str, WeightSlot]:
        assert self._rows is not None, "loaded after finish_loading"
        if not self._tied:
            return self._rows.weight_slots()
        # Some checkpoints hold a second copy of the tied weight.
        shape = (self._vocab_size, self._rows.hidden_size)
        return {f"{self._name}.weight": WeightSlot(shape, lambda tensor: None, required=False)}

    def finish_loading(self) -> None:
        assert self._rows is not None, "finish_loading called twice"
        self._packed = self._rows.pack(self._linear)
        self._rows = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size] → logits [num_rows, vocab_size] float32, the same on every rank."""
        # Rounded to bfloat16, logits near 20 would lie 0.125 apart, and near ties would be decided by chance.
        logits = self._linear(hidden, self._packed, out_dtype=torch.float32)
        if self._group.size > 1:
            logits = self._group.all_gather(logits)[:, : self._vocab_size]
        return logits
