"""Owns the types that linear's backends share: a packed weight, and the pair of functions a layer binds.
Does not know any layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from servd_kernels.native import Function

# enum Activation of common/activation.hpp
ACTIVATIONS: dict[str | None, int] = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}


class Run(Protocol):
    """A backend's linear. `linear()` holds the contract and the checks."""

    def __call__(
        self,
        x: torch.Tensor,
        packed: "PackedWeight",
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        activation: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class Pack(Protocol):
    """A backend's packing. `pack()` holds the contract and the checks."""

    def __call__(self, weight: torch.Tensor, gated: bool = False) -> "PackedWeight": ...


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the layout of the backend that packed it; only that backend's `run` can read it."""

    data: torch.Tensor
    out_features: int  # columns of the output: with a gate, half of the weight's rows
    in_features: int
    run: Run
    rows: Callable[[torch.Tensor], torch.Tensor]  # ids [n] int64 -> those rows of the weight [n, in_features], exact
    kernel: Function | None = None  # native code of the instruction set that fits the layout
    gated: bool = False


@dataclass(frozen=True, slots=True)
class BoundLinear:
    """What a layer holds: pack at load, then call."""

    pack: Pack
    run: Run

    def __call__(
        self,
        x: torch.Tensor,
        packed: PackedWeight,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        activation: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.run(x, packed, bias, out_dtype, activation, residual)
