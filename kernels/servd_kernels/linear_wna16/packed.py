"""Owns the types that the backends of linear_wna16 share: a grouped weight, and its packed form.
Does not know any layout."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from servd_kernels.coded_linear import FLOATS
from servd_kernels.weight_quant import group_count, spread

ACTIVATIONS = ("none", "int8")


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """Codes of 4 or 8 bits, and for each run of group_size columns a scale and a zero point or a minimum.

    weight = (codes - zeros) * scales, or codes * scales + minima; with neither, zeros are 2**(bits - 1). The last
    group may be shorter. Raises ValueError for shapes, dtypes or codes that do not fit.
    """

    codes: torch.Tensor  # [out_features, in_features] uint8, one code each
    scales: torch.Tensor  # [out_features, num_groups] float32, bfloat16 or float16
    bits: int
    group_size: int
    zeros: torch.Tensor | None = None  # [out_features, num_groups] uint8
    minima: torch.Tensor | None = None  # [out_features, num_groups], of the scales' dtype

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}; allowed: 4, 8")
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; allowed: at least 1")
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            shape = f"{self.codes.dtype} {list(self.codes.shape)}"
            raise ValueError(f"codes must be torch.uint8 [out_features, in_features], not {shape}")
        if self.codes.numel() and int(self.codes.max()) >= 2**self.bits:
            raise ValueError(f"codes hold {int(self.codes.max())}; allowed: 0..{2**self.bits - 1}")
        if self.scales.dtype not in FLOATS:
            raise ValueError(f"scales are {self.scales.dtype}; allowed: {', '.join(map(str, FLOATS))}")
        if self.zeros is not None and self.minima is not None:
            raise ValueError("zeros and minima are both given; allowed: one of them")
        for name, tensor, dtype in (
            ("scales", self.scales, self.scales.dtype),
            ("zeros", self.zeros, torch.uint8),
            ("minima", self.minima, self.scales.dtype),
        ):
            shape_needed = [len(self.codes), group_count(self.codes.shape[1], self.group_size)]
            if tensor is not None and (list(tensor.shape) != shape_needed or tensor.dtype != dtype):
                raise ValueError(f"{name} must be {dtype} {shape_needed}, not {tensor.dtype} {list(tensor.shape)}")

    def dequantize(self) -> torch.Tensor:
        """The weight these codes stand for, float32 [out_features, in_features]."""
        columns = self.codes.shape[1]
        scales = spread(self.scales.float(), self.group_size, columns)
        if self.minima is not None:
            return self.codes.float() * scales + spread(self.minima.float(), self.group_size, columns)
        middle = torch.tensor(2.0 ** (self.bits - 1))
        zeros = middle if self.zeros is None else spread(self.zeros.float(), self.group_size, columns)
        return (self.codes.float() - zeros) * scales


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A grouped weight in the layout of the backend that packed it; only that backend's `run` can read it."""

    data: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None  # zeros or minima, in the backend's layout
    out_features: int  # columns of the output: with a gate, half of the weight's rows
    in_features: int
    bits: int
    group_size: int
    activations: str  # "none": as they come; "int8": rounded to int8 in each group of columns, first
    gated: bool
    run: Callable[..., torch.Tensor]
    kernel: Callable[..., int] | None = None  # native code of the instruction set that fits the layout
    form: object = None  # what else the backend must know of its layout
