"""What a model's step cannot do without: bytes of weights to read, operations to do, by the unit that does them.

Owns the walk over a model's packed weights. Knows nothing of time.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch

from bench.profiling.ops import DTYPE_UNITS, weight_cost
from servd.layers.embedding import LMHead
from servd.layers.linear import QKVParallelLinear
from servd.models.base import Model


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Costs of one model."""

    weight_bytes: int  # read by every step
    operations: dict[str, int]  # by unit, for each token
    head_operations: dict[str, int]  # by unit, for each token that gets logits
    attention_operations: int  # for each pair of a query and a key, in all layers
    attention_unit: str

    def seconds(self, tokens: int, sampled: int, peaks: Mapping[str, float]) -> float:
        """The least time for the products of so many tokens, of which `sampled` get logits; operations/s by unit."""
        body = sum(tokens * operations / peaks[unit] for unit, operations in self.operations.items())
        return body + sum(sampled * operations / peaks[unit] for unit, operations in self.head_operations.items())


def model_cost(model: Model) -> ModelCost:
    """Of a model that is loaded."""
    unit = DTYPE_UNITS[model.dtype]
    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    weight_bytes, seen = 0, set[int]()
    for layer in sorted(model.layers(), key=lambda layer: not isinstance(layer, LMHead)):  # a tied weight is the head's
        for packed in _packed_weights(layer, seen):
            moved, operations, weight_unit = weight_cost(packed, unit)
            weight_bytes += moved
            counts[isinstance(layer, LMHead)][weight_unit] += operations
    heads = next(layer.num_heads for layer in model.layers() if isinstance(layer, QKVParallelLinear))
    pair_operations = 4 * heads * model.head_dim * model.num_layers
    return ModelCost(weight_bytes, dict(counts[False]), dict(counts[True]), pair_operations, unit)


def _packed_weights(layer: object, seen: set[int]) -> list[Any]:
    """All packed weights that hang on a layer, each once; of a function only what it closes over is looked at."""
    found: list[Any] = []
    waiting = [layer]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | torch.Tensor | str | int):
            continue
        seen.add(id(thing))
        if isinstance(thing, FunctionType):
            waiting += [cell.cell_contents for cell in thing.__closure__ or ()]
            continue
        if all(hasattr(thing, name) for name in ("data", "in_features", "out_features")):
            found.append(thing)
        else:
            waiting += gc.get_referents(thing)
    return found
