"""What all layers share: where they live, and how a checkpoint's tensors find them.

Knows nothing of files, or of any one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from servd_kernels.linear_wna16 import GroupedWeight
from torch import Tensor

from servd.distributed.group import TPGroup
from servd.errors import ConfigError
from servd.quant.base import QuantMethod, Shard


@dataclass(frozen=True, slots=True)
class LayerContext:
    """What every layer of a model is built with."""

    dtype: torch.dtype
    device: torch.device
    group: TPGroup
    quant_method: type[QuantMethod]  # the weight format of linear layers
    deterministic: bool = True  # no routine whose bits depend on the batch


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """A tensor that a layer wants from the checkpoint, by the checkpoint's name for it."""

    shape: tuple[int, ...]  # of the whole tensor, before sharding
    load: Callable[[Tensor], None]  # takes this rank's part, in any floating dtype
    required: bool = True
    load_codes: Callable[[GroupedWeight], None] | None = None  # takes its codes and scales, where the file has those


def matrix_slots(
    quant: QuantMethod, name: str, out_features: int, in_features: int, shard: Shard
) -> dict[str, WeightSlot]:
    """Where `quant` takes `shard` of the checkpoint's matrix `name`, [out_features, in_features], from."""
    load_codes = partial(quant.load_codes, shard=shard) if quant.takes_codes else None
    return {
        f"{name}.{suffix}": WeightSlot(shape, partial(quant.load_shard, suffix, shard=shard), load_codes=load_codes)
        for suffix, shape in quant.checkpoint_shapes(out_features, in_features).items()
    }


class Layer:
    """A part of a model that owns weights. Plain Python, not nn.Module: a call costs one frame."""

    def weight_slots(self) -> dict[str, WeightSlot]:
        """What to load, by full name in the checkpoint."""
        return {}

    def finish_loading(self) -> None:
        """All slots are loaded: bring the weights into their final form."""


def check_divides(what: str, total: int, group: TPGroup) -> None:
    """Raise ConfigError if `total` cannot be shared evenly by the ranks."""
    if total % group.size:
        raise ConfigError(f"{what} is {total}; allowed: a multiple of the {group.size} tensor-parallel ranks")
