"""The contract of a KV storage type: the size of a block, and the tensors that hold them.

Knows nothing of which block belongs to whom.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from servd.registry import Registry


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The shape of the KV cache that a model needs on this rank."""

    num_layers: int
    num_kv_heads: int  # on this rank
    head_dim: int
    block_size: int  # tokens
    dtype: torch.dtype  # the model's compute dtype
    device: torch.device


class KVDtype(ABC):
    """A storage type. Values and their scales, if any, live in the same block: copying a block copies both."""

    def __init__(self, spec: KVCacheSpec) -> None:
        self.spec = spec

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one block over all layers of this rank."""

    @abstractmethod
    def allocate(self, num_blocks: int) -> list[Tensor]:
        """One tensor a layer, its first axis the blocks; contents undefined. Block 0 is the null block."""


KV_DTYPES: Registry[type[KVDtype]] = Registry("KV cache dtype", "servd.kv_dtypes")
