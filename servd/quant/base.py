"""The contract of a weight format: how one linear layer's matrix is stored, loaded and multiplied.

Knows nothing of ranks or of fused projections: a `Shard` says which part goes where.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor

from servd.quant.codes import Part, cut
from servd.registry import Registry


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a checkpoint's matrix that this rank keeps; counted in features, whatever the packing."""

    out_features: slice  # rows kept of the checkpoint's matrix
    in_features: slice  # columns kept
    offset: int  # output feature of the layer's own matrix where the kept rows begin


class QuantMethod(ABC):
    """One linear layer's matrix, [out_features, in_features]; an instance belongs to one layer.

    Order of calls: `create_weights`, `load_shard` for every tensor of every part (or `load_codes` for the part),
    `finish_loading`, then `apply`.
    """

    takes_codes: ClassVar[bool] = False  # prefers a checkpoint's codes, where it holds them, to floats made of them
    keeps_rows: ClassVar[bool] = False  # `rows` is there once the weights are loaded

    rows: Callable[[Tensor], Tensor] | None = None  # ids [n] → those rows of the matrix [n, in_features], exact
    applies_gate: bool = False  # known once the weights are loaded: `apply` ends with the gate, half as wide

    def __init__(self, dtype: torch.dtype, device: torch.device, deterministic: bool) -> None:
        """`deterministic`: only kernels whose bits do not depend on the batch."""
        self.dtype = dtype
        self.device = device
        self.deterministic = deterministic

    @classmethod
    def for_head(cls) -> type[QuantMethod]:
        """What the output head is held in, where a format is too coarse for it."""
        return cls

    @abstractmethod
    def create_weights(self, out_features: int, in_features: int, gate: str | None = None) -> None:
        """Make room for this rank's matrix, all fused parts together. Features that no part fills are zeros.

        gate (silu, gelu, gelu_tanh): the first half of the features is the gate of the second, activation(gate) * up,
        which a format may apply as it multiplies. Raises ConfigError for sizes that the format cannot have.
        """

    def checkpoint_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """What a checkpoint holds for a whole matrix of that size: last part of the tensor's name → its shape."""
        return {"weight": (out_features, in_features)}

    def load_shard(self, name: str, tensor: Tensor, shard: Shard) -> None:
        """Take `shard` out of the checkpoint's tensor, whose name ends in `name` and whose shape was checked."""
        self.take(tensor[shard.out_features, shard.in_features], shard.offset)

    def load_codes(self, weight: GroupedWeight, shard: Shard) -> None:
        """Take `shard` out of a whole matrix that the checkpoint holds as codes and scales, where `takes_codes`.

        Raises ConfigError if the shard's columns cut a group in two.
        """
        self.take(cut(weight, shard.out_features, shard.in_features), shard.offset)

    @abstractmethod
    def take(self, part: Part, offset: int) -> None:
        """The rows of this rank's matrix from `offset` on, in any floating dtype or, where `takes_codes`, as codes.

        Floats are the file's memory: a method that keeps them copies them.
        """

    @abstractmethod
    def finish_loading(self) -> None:
        """All parts are there: bring them into the form that the kernel wants."""

    @abstractmethod
    def apply(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [num_tokens, in_features] times the matrix, plus bias [out_features] → [num_tokens, out_features].

        In x's dtype, or in float32 where `out_dtype` asks for it. A row of the result depends on that row of x alone,
        to the bit, where the layer is deterministic.
        """


QUANT_METHODS: Registry[type[QuantMethod]] = Registry("weight format", "servd.quant")
