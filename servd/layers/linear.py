"""Linear layers, whole or split over ranks, alone or fused; each knows its parts' names in the checkpoint.

Knows nothing of how a matrix is stored (a QuantMethod does) or of what the layer is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from servd.errors import ConfigError
from servd.layers.activation import epilogue, gated_activation
from servd.layers.base import Layer, LayerContext, WeightSlot, check_divides, matrix_slots
from servd.quant.base import Shard

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class _Part:
    """One matrix of the checkpoint, and what this rank keeps of it."""

    name: str  # in the checkpoint, without ".weight"
    out_features: int  # of the whole matrix
    kept: slice  # output features of this rank


class ReplicatedLinear(Layer):
    """x @ weight.T + bias, whole on every rank: also the base of the others, which differ in what a rank keeps."""

    def __init__(self, context: LayerContext, name: str, in_features: int, out_features: int, *, bias: bool) -> None:
        self._build(context, [_Part(name, out_features, slice(0, out_features))], in_features, _ALL, bias)

    def _build(
        self,
        context: LayerContext,
        parts: Sequence[_Part],
        in_features: int,
        kept_inputs: slice,
        bias: bool,
        gate: str | None = None,
    ) -> None:
        self._parts = parts
        self._in_features = in_features
        self._kept_inputs = kept_inputs
        self.out_features = sum(part.kept.stop - part.kept.start for part in parts)  # of this rank, fused
        self._quant = context.quant_method(context.dtype, context.device, context.deterministic)
        try:
            self._quant.create_weights(self.out_features, len(range(in_features)[kept_inputs]), gate)
        except ConfigError as error:
            raise ConfigError(f"{', '.join(part.name for part in parts)}: {error.message}") from None
        self._bias = torch.empty(self.out_features, dtype=context.dtype, device=context.device) if bias else None

    def weight_slots(self) -> dict[str, WeightSlot]:
        slots: dict[str, WeightSlot] = {}
        offset = 0
        for part in self._parts:
            shard = Shard(part.kept, self._kept_inputs, offset)
            slots |= matrix_slots(self._quant, part.name, part.out_features, self._in_features, shard)
            if self._bias is not None:
                slots[f"{part.name}.bias"] = WeightSlot((part.out_features,), partial(self._load_bias, shard=shard))
            offset += part.kept.stop - part.kept.start
        return slots

    def _load_bias(self, tensor: Tensor, *, shard: Shard) -> None:
        assert self._bias is not None, "a layer without bias has no slot for one"
        kept = tensor[shard.out_features]
        self._bias[shard.offset : shard.offset + kept.shape[0]].copy_(kept)

    def finish_loading(self) -> None:
        self._quant.finish_loading()

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features of this rank] → [num_tokens, out_features of this rank]."""
        return self._quant.apply(x, self._bias)


class MergedColumnParallelLinear(ReplicatedLinear):
    """Several matrices over the same input, each split by output features, fused into one on each rank."""

    def __init__(
        self,
        context: LayerContext,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        *,
        bias: bool,
        gate: str | None = None,
    ) -> None:
        for name, total in zip(names, out_features, strict=True):
            check_divides(f"output features of {name}", total, context.group)
        parts = [_Part(n, total, context.group.shard(total)) for n, total in zip(names, out_features, strict=True)]
        self._build(context, parts, in_features, _ALL, bias, gate)


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One matrix, split by output features: each rank computes its own slice of the output."""

    def __init__(self, context: LayerContext, name: str, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(context, [name], in_features, [out_features], bias=bias)


class GatedLinear(MergedColumnParallelLinear):
    """activation(x @ gate.T) * (x @ up.T), both split by output features (Shazeer 2020, GLU Variants)."""

    def __init__(
        self,
        context: LayerContext,
        names: Sequence[str],
        in_features: int,
        out_features: int,
        *,
        hidden_act: str,
        bias: bool,
    ) -> None:
        """`names`: of gate and up. Raises ConfigError for an activation that is not known."""
        gate = epilogue(hidden_act)
        super().__init__(context, names, in_features, [out_features, out_features], bias=bias, gate=gate)
        self._activation = gated_activation(hidden_act, context, self.out_features // 2)

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] → [num_tokens, out_features of this rank]."""
        output = self._quant.apply(x, self._bias)
        return output if self._quant.applies_gate else self._activation(output)


class QKVParallelLinear(ReplicatedLinear):
    """q_proj, k_proj and v_proj in one, split by heads; KV heads are repeated where there are more ranks than heads.

    The output's columns are q, k, v: `num_heads`, `num_kv_heads`, `num_kv_heads` of this rank, `head_dim` each.
    """

    def __init__(
        self,
        context: LayerContext,
        prefix: str,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
    ) -> None:
        group = context.group
        check_divides("num_attention_heads", num_heads, group)
        if num_kv_heads % group.size and group.size % num_kv_heads:
            raise ConfigError(
                f"num_key_value_heads is {num_kv_heads}; "
                f"allowed: a multiple or a divisor of the {group.size} tensor-parallel ranks"
            )
        heads, kv_heads = group.shard(num_heads), group.shard_or_replicate(num_kv_heads)
        self.num_heads = heads.stop - heads.start
        self.num_kv_heads = kv_heads.stop - kv_heads.start
        parts = [
            _Part(f"{prefix}.{name}", total * head_dim, slice(kept.start * head_dim, kept.stop * head_dim))
            for name, total, kept in (
                ("q_proj", num_heads, heads),
                ("k_proj", num_kv_heads, kv_heads),
                ("v_proj", num_kv_heads, kv_heads),
            )
        ]
        self._build(context, parts, hidden_size, _ALL, bias)


class RowParallelLinear(ReplicatedLinear):
    """One matrix, split by input features: the ranks' partial results are summed."""

    def __init__(self, context: LayerContext, name: str, in_features: int, out_features: int, *, bias: bool) -> None:
        group = context.group
        check_divides(f"input features of {name}", in_features, group)
        self._group = group
        parts = [_Part(name, out_features, slice(0, out_features))]
        self._build(context, parts, in_features, group.shard(in_features), bias)

    def finish_loading(self) -> None:
        super().finish_loading()
        if self._group.rank > 0:
            self._bias = None  # the sum over the ranks must hold it once

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features of this rank] → [num_tokens, out_features], the same on every rank."""
        output = self._quant.apply(x, self._bias)
        return output if self._group.size == 1 else self._group.all_reduce(output)
