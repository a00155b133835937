"""Token embedding and the output head, split by vocabulary; a tied head shares the embedding's weight.

Knows nothing of tokenizers or sampling.
"""

from __future__ import annotations

import torch
from servd_kernels import embedding
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor

from servd.errors import ConfigError
from servd.layers.base import Layer, LayerContext, WeightSlot, matrix_slots
from servd.quant.base import QuantMethod, Shard
from servd.quant.codes import float_rows

_ALL = slice(None)


def _share(context: LayerContext, vocab_size: int) -> tuple[int, slice]:
    """Rows of a rank, all ranks alike, and which of the vocabulary's they are: the last ranks may have fewer."""
    num_rows = -(-vocab_size // context.group.size)
    first = min(context.group.rank * num_rows, vocab_size)
    return num_rows, slice(first, min(first + num_rows, vocab_size))


class VocabEmbedding(Layer):
    """Rows of the vocabulary, in the compute dtype; ranks hold equal runs of them, the last one padded with zeros."""

    def __init__(self, context: LayerContext, name: str, vocab_size: int, hidden_size: int) -> None:
        self._name = name
        self._group = context.group
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_rows, self._kept = _share(context, vocab_size)
        # [num_rows, hidden_size]; None where a head gives its rows
        self._weight: Tensor | None = torch.zeros(
            self.num_rows, hidden_size, dtype=context.dtype, device=context.device
        )
        self._look_up = embedding.OP.bind(device=context.device.type, dtype=context.dtype)
        self._head: QuantMethod | None = None

    def tie(self, head: QuantMethod) -> None:
        """Before loading: the matrix goes to `head` too, or to it alone where it can give rows back."""
        self._head = head
        if head.keeps_rows:
            self._weight = None

    def weight_slots(self) -> dict[str, WeightSlot]:
        load_codes = self._load_codes if self._head is not None and self._head.takes_codes else None
        shape = (self.vocab_size, self.hidden_size)
        return {f"{self._name}.weight": WeightSlot(shape, self._load, load_codes=load_codes)}

    def _load(self, tensor: Tensor) -> None:
        kept = tensor[self._kept]
        if self._weight is not None:
            self._weight[: len(kept)].copy_(kept)
        if self._head is not None:
            self._head.load_shard("weight", tensor, Shard(self._kept, _ALL, 0))

    def _load_codes(self, weight: GroupedWeight) -> None:
        assert self._head is not None, "an embedding alone takes no codes"
        if self._weight is not None:
            for rows, values in float_rows(weight, self._kept):
                self._weight[rows].copy_(values)
        self._head.load_codes(weight, Shard(self._kept, _ALL, 0))

    def _rows(self, ids: Tensor) -> Tensor:
        if self._weight is not None:
            rows: Tensor = self._look_up(ids, self._weight)
            return rows
        assert self._head is not None and self._head.rows is not None, "asked for rows before they were loaded"
        return self._head.rows(ids)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids [num_tokens] int64 → [num_tokens, hidden_size]."""
        if self._group.size == 1:
            return self._rows(input_ids)
        rows = input_ids - self._kept.start
        elsewhere = (rows < 0) | (rows >= self.num_rows)
        hidden = self._rows(rows.masked_fill(elsewhere, 0))
        return self._group.all_reduce(hidden.masked_fill(elsewhere.unsqueeze(-1), 0))


class LMHead(Layer):
    """Hidden states to logits; each rank computes its run of the vocabulary and gathers the others'.

    A tied head's matrix comes from the embedding. In the compute dtype it is held once; a coded head is one of its own
    beside the embedding's rows, which then cost vocab_size * hidden_size numbers of the compute dtype.
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
        self._hidden_size = hidden_size
        self._tied_to = tied_to
        num_rows, self._kept = _share(context, vocab_size)
        self._quant = context.quant_method.for_head()(context.dtype, context.device, context.deterministic)
        try:
            self._quant.create_weights(num_rows, hidden_size)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error.message}") from None
        if tied_to is not None:
            tied_to.tie(self._quant)

    def weight_slots(self) -> dict[str, WeightSlot]:
        if self._tied_to is not None:
            # Some checkpoints hold a second copy of the tied weight.
            shape = (self._vocab_size, self._hidden_size)
            return {f"{self._name}.weight": WeightSlot(shape, lambda tensor: None, required=False)}
        shard = Shard(self._kept, _ALL, 0)
        return matrix_slots(self._quant, self._name, self._vocab_size, self._hidden_size, shard)

    def finish_loading(self) -> None:
        self._quant.finish_loading()

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size] → logits [num_rows, vocab_size] float32, the same on every rank."""
        # Rounded to bfloat16, logits near 20 would lie 0.125 apart, and near ties would be decided by chance.
        logits = self._quant.apply(hidden, None, torch.float32)
        if self._group.size > 1:
            logits = self._group.all_gather(logits)[:, : self._vocab_size]
        return logits
