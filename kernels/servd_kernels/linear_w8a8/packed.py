"""Owns the packed weight that the backends of linear_w8a8 share.
Does not know any layout."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """An int8 weight in the layout of the backend that packed it; only that backend's `run` can read it."""

    data: torch.Tensor
    scales: torch.Tensor  # [out_features] float32; with a gate twice as many
    out_features: int  # columns of the output: with a gate, half of the weight's rows
    in_features: int
    activation_group: int | None  # columns of x that share a scale; None: the whole row
    rotation: int | None  # columns of a block of x that is rotated first; None: none is
    gated: bool
    run: Callable[..., torch.Tensor]
    kernel: Callable[..., int] | None = None  # native code of the instruction set that fits the layout
