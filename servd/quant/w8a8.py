"""Weights of 8 bits with a scale for each output feature, activations rounded to 8 bits token by token.

Knows nothing of files. Both are rotated in blocks of columns first, which spreads the outliers that plain rounding
would pay for (Ashkboos et al. 2024, "QuaRot", https://arxiv.org/abs/2404.00456).
"""

from __future__ import annotations

import torch
from servd_kernels import linear, linear_w8a8
from servd_kernels.linear_w8a8 import MAX_IN_FEATURES
from servd_kernels.weight_quant import rotate
from torch import Tensor

from servd.errors import ConfigError
from servd.quant.base import QUANT_METHODS, QuantMethod
from servd.quant.codes import Part, float_rows

_MAX_ROTATION = 64  # wider blocks gain nothing that a starter-sized model shows, and cost each token more
_MIN_ROTATION = 16


@QUANT_METHODS.register("w8a8")
class W8A8Weights(QuantMethod):
    """Converted as they are loaded, a few rows at a time."""

    takes_codes = True

    def create_weights(self, out_features: int, in_features: int, gate: str | None = None) -> None:
        if in_features > MAX_IN_FEATURES:
            raise ConfigError(f"in_features is {in_features}; allowed with w8a8: up to {MAX_IN_FEATURES}")
        block = min(_MAX_ROTATION, in_features & -in_features)  # the largest power of two that divides
        self._rotation = block if block >= _MIN_ROTATION else None
        self._gate = gate
        self.applies_gate = gate is not None
        self._shape = (out_features, in_features)
        self._num_missing = out_features
        self._unpacked: tuple[Tensor, Tensor] | None = None  # codes [out_features, in_features], scales [out_features]

    def take(self, part: Part, offset: int) -> None:
        if self._unpacked is None:
            codes = torch.zeros(self._shape, dtype=torch.int8, device=self.device)
            self._unpacked = codes, torch.zeros(self._shape[0], device=self.device)
        codes, scales = self._unpacked
        size = self._rotation
        hadamard = linear.pack(rotate(torch.eye(size, device=self.device), size)) if size else None
        for rows, values in float_rows(part):
            own = slice(offset + rows.start, offset + rows.stop)
            values = values.to(self.device)
            if hadamard:  # as a product: a third of the time of `rotate`; with our kernel: the same bits always
                values = linear.linear(values.reshape(-1, hadamard.in_features), hadamard).view_as(values)
            codes[own], scales[own] = linear_w8a8.quantize_weight(values)
            self._num_missing -= own.stop - own.start
        if self._num_missing == 0:  # at once: loose codes of all layers would be a second model
            self.finish_loading()

    def finish_loading(self) -> None:
        if self._unpacked is None:
            return
        self._packed = linear_w8a8.pack(*self._unpacked, gated=self.applies_gate, rotation=self._rotation)
        self._run = self._packed.run
        self._unpacked = None

    def apply(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
        return self._run(x, self._packed, bias, out_dtype, None, self._gate)
