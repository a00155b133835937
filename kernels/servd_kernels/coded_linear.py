"""Owns what the linears over coded weights share: what a layer binds, the checks of what follows the product.
Does not know codes or scales, nor any backend."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from servd_kernels.linear.packed import ACTIVATIONS
from servd_kernels.strides import check_last_stride

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PackedCodes(Protocol):
    """What every packed weight of theirs has."""

    @property
    def out_features(self) -> int: ...  # columns of the output: with a gate, half of the weight's rows

    @property
    def in_features(self) -> int: ...

    @property
    def gated(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class BoundLinear:
    """What a layer holds: pack at load, then call. Arguments as the op's own functions have them."""

    pack: Callable[..., Any]  # the op's packed weight
    run: Callable[..., Tensor]

    def __call__(self, x: Tensor, packed: PackedCodes, *arguments: Any, **named: Any) -> Tensor:
        return self.run(x, packed, *arguments, **named)


def check_gated(num_rows: int, gated: bool) -> None:
    """Raises ValueError where a gated weight cannot be cut into a gate matrix and an up matrix."""
    if gated and num_rows % 2:
        raise ValueError(f"a gated weight must have as many up rows as gate rows, not {num_rows} in all")


def check_end(
    packed: PackedCodes,
    x: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    activation: str | None,
    residual: Tensor | None,
) -> None:
    """Raises ValueError for an x of another width, and for what cannot follow the product."""
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x must be [num_rows, {packed.in_features}], not {list(x.shape)}")
    columns = packed.out_features
    for name, tensor, shape in (
        ("bias", bias, [2 * columns if packed.gated else columns]),
        ("residual", residual, [len(x), columns]),
    ):
        if tensor is not None and (list(tensor.shape) != shape or tensor.dtype not in FLOATS):
            raise ValueError(f"{name} must be floating {shape}, not {tensor.dtype} {list(tensor.shape)}")
    check_last_stride(bias=bias, residual=residual)
    if out_dtype is not None and out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}; allowed: {', '.join(map(str, FLOATS))}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(map(str, ACTIVATIONS))}")
