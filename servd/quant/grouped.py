"""Weights of 4 or 8 bits with a scale for every few columns: converted as they are loaded, or as the file has them.

Knows nothing of files. A layer whose parts are stored differently multiplies with each kind in its turn.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from itertools import groupby
from typing import ClassVar

import torch
from servd_kernels import linear, linear_wna16
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor

from servd.quant.base import QUANT_METHODS, QuantMethod
from servd.quant.codes import Part, fieldwise, float_rows, form, num_rows, stack, with_zero_rows

_Product = Callable[[Tensor, Tensor | None, torch.dtype | None], Tensor]  # x, bias, out_dtype


class GroupedWeights(QuantMethod):
    """Any mixture of coded and plain parts; parts of one form that follow each other are one matrix."""

    takes_codes = True
    activations: str  # what the kernel makes of x: "none" takes it as it comes, "int8" rounds each group

    @abstractmethod
    def convert(self, part: Part) -> Part:
        """A part of this rank, [rows, columns], in the form in which it is kept."""

    def create_weights(self, out_features: int, in_features: int, gate: str | None = None) -> None:
        self._out_features = out_features
        self._gate = gate
        self._num_loaded = 0
        self._parts: list[tuple[int, Part]] = []  # and where each begins
        self._products: list[tuple[slice, _Product]] = []  # and the features that each gives

    def take(self, part: Part, offset: int) -> None:
        part = self.convert(part)
        self._parts.append((offset, part))
        self._num_loaded += num_rows(part)
        if self._num_loaded == self._out_features:  # at once: loose parts of all layers would be a second model
            self._pack()

    def finish_loading(self) -> None:
        if self._parts:  # a vocabulary that ends before this rank's features do
            self._pack(self._out_features - self._num_loaded)

    def _pack(self, zero_rows: int = 0) -> None:
        parts = [part for _, part in sorted(self._parts, key=lambda entry: entry[0])]
        self._parts = []
        if zero_rows:
            parts[-1] = with_zero_rows(parts[-1], zero_rows)
        runs = [list(run) for _, run in groupby(parts, form)]
        self.applies_gate = self._gate is not None and len(runs) == 1  # else the halves are of different forms
        begin = 0
        for same in runs:
            end = begin + sum(map(num_rows, same))
            self._products.append((slice(begin, end), self._product(stack(same))))
            begin = end

    def _product(self, matrix: Part) -> _Product:
        packed: linear.PackedWeight | linear_wna16.PackedWeight
        if isinstance(matrix, Tensor):
            packed = linear.pack(matrix, gated=self.applies_gate, deterministic=self.deterministic)
        else:
            packed = linear_wna16.pack(matrix, self.activations, gated=self.applies_gate)
        run: Callable[..., Tensor] = packed.run
        activation = self._gate if self.applies_gate else None
        return lambda x, bias, out_dtype: run(x, packed, bias, out_dtype, activation)

    def apply(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
        if len(self._products) == 1:
            return self._products[0][1](x, bias, out_dtype)
        outputs = [
            product(x, None if bias is None else bias[features], out_dtype) for features, product in self._products
        ]
        return torch.cat(outputs, dim=1)

    def _moved(self, weight: GroupedWeight) -> GroupedWeight:
        """On the device where it is multiplied."""
        return fieldwise(lambda tensor: tensor.to(self.device), weight)


class ConvertedWeights(GroupedWeights):
    """All parts in codes of one width; a file's codes of that width are taken over, with the groups that they have."""

    bits: ClassVar[int]
    group_size: ClassVar[int]
    symmetric: ClassVar[bool]

    def convert(self, part: Part) -> Part:
        if isinstance(part, GroupedWeight) and part.bits == self.bits:
            return self._moved(part)
        return stack([
            linear_wna16.quantize_weight(rows.to(self.device), self.bits, self.group_size, self.symmetric)
            for _, rows in float_rows(part)
        ])  # fmt: skip


class FourBitWeights(ConvertedWeights):
    """4-bit weights in groups of 32."""

    bits, group_size, symmetric = 4, 32, False

    @classmethod
    def for_head(cls) -> type[QuantMethod]:
        return Int8Weights


@QUANT_METHODS.register("w4a16")
class W4A16Weights(FourBitWeights):
    """Activations as they are."""

    activations = "none"


@QUANT_METHODS.register("w4a8")
class W4A8Weights(FourBitWeights):
    """Activations rounded to int8 in the weights' groups."""

    activations = "int8"


@QUANT_METHODS.register("int8")
class Int8Weights(ConvertedWeights):
    """8-bit weights in groups of 128, activations as they are."""

    bits, group_size, symmetric, activations = 8, 128, True, "none"


@QUANT_METHODS.register("stored")
class StoredWeights(GroupedWeights):
    """As the file has them: coded parts with the file's own codes and scales, plain ones in the compute dtype.

    On a CPU activations are rounded to int8 in the weights' groups and multiplied as integers; on a GPU, whose tensor
    cores multiply floats as fast, they are used as they are.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, deterministic: bool) -> None:
        super().__init__(dtype, device, deterministic)
        self.activations = "int8" if device.type == "cpu" else "none"

    def convert(self, part: Part) -> Part:
        if isinstance(part, GroupedWeight):
            return self._moved(part)
        return part.to(self.device, self.dtype, copy=True)  # the file's memory is its own
