"""Weights in the compute dtype, packed for the linear kernel.

Knows nothing of scales: there are none.
"""

from __future__ import annotations

from typing import cast

import torch
from servd_kernels import linear
from torch import Tensor

from servd.quant.base import QUANT_METHODS, QuantMethod
from servd.quant.codes import Part


@QUANT_METHODS.register("none")
class DenseWeights(QuantMethod):
    """One tensor `weight` a part; any floating dtype on disk is cast to the compute dtype."""

    keeps_rows = True

    def __init__(self, dtype: torch.dtype, device: torch.device, deterministic: bool) -> None:
        super().__init__(dtype, device, deterministic)
        bound = linear.OP.bind(device=device.type, dtype=dtype, deterministic=deterministic)
        self._linear = cast(linear.BoundLinear, bound)
        self._weight: Tensor | None = None  # [out_features, in_features] until it is packed

    def create_weights(self, out_features: int, in_features: int, gate: str | None = None) -> None:
        self._weight = torch.zeros(out_features, in_features, dtype=self.dtype, device=self.device)
        self._gate = gate
        self.applies_gate = gate is not None

    def take(self, part: Part, offset: int) -> None:
        assert self._weight is not None, "loaded after finish_loading"
        assert isinstance(part, Tensor), "codes given to a format that takes none"
        self._weight[offset : offset + len(part)].copy_(part)

    def finish_loading(self) -> None:
        assert self._weight is not None, "finish_loading called twice"
        self._packed = self._linear.pack(self._weight, self.applies_gate)
        self._weight = None  # the packed form may be a copy: never hold both
        self.rows = self._packed.rows

    def apply(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
        return self._linear.run(x, self._packed, bias, out_dtype, self._gate)
