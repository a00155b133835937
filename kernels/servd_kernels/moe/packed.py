"""Owns the types that moe's backends share: packed experts, and the pair of functions a layer binds.
Does not know any layout."""

from dataclasses import dataclass
from typing import Protocol

import torch

from servd_kernels.native import Function


class Run(Protocol):
    """A backend's moe. `moe()` holds the contract and the checks."""

    def __call__(
        self,
        x: torch.Tensor,
        packed: "PackedExperts",
        weights: torch.Tensor,
        ids: torch.Tensor,
        activation: str | None = "silu",
    ) -> torch.Tensor: ...


class Pack(Protocol):
    """A backend's packing. `pack()` holds the contract and the checks."""

    def __call__(self, gate_up: torch.Tensor, down: torch.Tensor) -> "PackedExperts": ...


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The experts' weights in the layout of the backend that packed them; only that backend's `run` can read them."""

    gate_up: torch.Tensor
    down: torch.Tensor
    num_experts: int
    hidden: int
    intermediate: int
    run: Run
    kernel: Function | None = None  # native code of the instruction set that fits the layout


@dataclass(frozen=True, slots=True)
class BoundMoe:
    """What a layer holds: pack at load, then call."""

    pack: Pack
    run: Run

    def __call__(
        self,
        x: torch.Tensor,
        packed: PackedExperts,
        weights: torch.Tensor,
        ids: torch.Tensor,
        activation: str | None = "silu",
    ) -> torch.Tensor:
        return self.run(x, packed, weights, ids, activation)
