"""Which storage type each layer's keys and values have: the meaning of --kv-cache-dtype and --kv-cache-skip-layers.

Knows nothing of how a block is laid out (servd_kernels.kv_format), nor of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from servd_kernels.kv_format import CODES, KVFormat

from servd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KVCacheDtype:
    """The storage of one model's cache; "auto" stands for the model's compute dtype."""

    key: str = "auto"
    value: str = "auto"
    block_size: int = 16  # tokens
    skip_layers: frozenset[int] = frozenset()  # layers that stay in the compute dtype

    def __post_init__(self) -> None:
        for name in (self.key, self.value):
            if name != "auto" and name not in CODES:
                raise ConfigError(f"--kv-cache-dtype is {name!r}; allowed: auto, {', '.join(CODES)}")

    def format(self, layer: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVFormat:
        """The layout of one layer's blocks. Raises ValueError for a head size that it cannot hold."""
        plain = str(dtype).removeprefix("torch.")

        def code(name: str) -> str:
            return plain if name == "auto" or layer in self.skip_layers else name

        return KVFormat(code(self.key), code(self.value), num_kv_heads, head_dim, self.block_size)
