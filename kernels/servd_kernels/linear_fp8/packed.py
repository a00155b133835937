"""Owns the types that the backends of linear_fp8 share: a packed weight, and the pair of functions a layer binds.
Does not know any layout."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from servd_kernels.native import Function


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """An e4m3 weight in the layout of the backend that packed it; only that backend's `run` can read it."""

    data: torch.Tensor
    scales: torch.Tensor  # [out_features] float32
    out_features: int
    in_features: int
    activations: str  # "none": as they come; "fp8": rounded to e4m3 in each row, first
    run: "Run"
    kernel: Function | None = None  # native code of the instruction set that fits the layout


# x, packed, bias, out_dtype, x_scales, activation
Run = Callable[
    [torch.Tensor, PackedWeight, torch.Tensor | None, torch.dtype | None, torch.Tensor | None, str | None],
    torch.Tensor,
]


@dataclass(frozen=True, slots=True)
class BoundLinear:
    """What a layer holds: pack at load, then call."""

    pack: Callable[[torch.Tensor, torch.Tensor, str], PackedWeight]  # codes, scales, activations
    run: Run

    def __call__(
        self,
        x: torch.Tensor,
        packed: PackedWeight,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        x_scales: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        return self.run(x, packed, bias, out_dtype, x_scales, activation)
