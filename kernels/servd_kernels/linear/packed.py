"""Owns the two types that linear's backends share: a packed weight, and the pair of functions a layer binds.
Does not know any layout."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the layout of the backend that packed it; only that backend's `run` can read it."""

    data: torch.Tensor
    out_features: int
    in_features: int
    run: "Run"
    rows: Callable[[torch.Tensor], torch.Tensor]  # ids [n] int64 -> those rows of the weight [n, in_features], exact
    kernel: Callable[..., int] | None = None  # native code of the instruction set that fits the layout


Run = Callable[[torch.Tensor, PackedWeight, torch.Tensor | None, torch.dtype | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class BoundLinear:
    """What a layer holds: pack at load, then call."""

    pack: Callable[[torch.Tensor], PackedWeight]
    run: Run

    def __call__(
        self,
        x: torch.Tensor,
        packed: PackedWeight,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        return self.run(x, packed, bias, out_dtype)
