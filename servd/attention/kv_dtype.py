"""Which storage type each layer's keys and values have: the meaning of --kv-cache-dtype and --kv-cache-skip-layers.

Knows nothing of how a block is laid out (servd_kernels.kv_format), nor of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from servd_kernels.kv_format import KVFormat

from servd.config import CacheConfig, parse_kv_cache_dtype, parse_layers
from servd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KVCacheDtype:
    """The storage of one model's cache; "auto" stands for the model's compute dtype."""

    key: str = "auto"
    value: str = "auto"
    block_size: int = 16  # tokens
    skip_layers: frozenset[int] = frozenset()  # layers that stay in the compute dtype

    @classmethod
    def from_config(cls, config: CacheConfig) -> KVCacheDtype:
        """What the flags ask for. Raises ConfigError."""
        key, value = parse_kv_cache_dtype(config.kv_cache_dtype)
        return cls(key, value, config.block_size, parse_layers(config.kv_cache_skip_layers))

    @property
    def is_quantized(self) -> bool:
        """Whether some layer may be stored in something other than the compute dtype."""
        return (self.key, self.value) != ("auto", "auto")

    def plain(self) -> KVCacheDtype:
        """The same blocks in the compute dtype."""
        return KVCacheDtype(block_size=self.block_size)

    def formats(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, key_words: bool = False
    ) -> list[KVFormat]:
        """Each layer's layout, for that compute dtype. Raises ConfigError for layers or heads it cannot hold."""
        beyond = sorted(layer for layer in self.skip_layers if layer >= num_layers)
        if beyond:
            raise ConfigError(f"--kv-cache-skip-layers has layer {beyond[0]}; allowed: 0 to {num_layers - 1}")
        compute_dtype = str(dtype).removeprefix("torch.")

        def code(name: str, layer: int) -> str:
            return compute_dtype if name == "auto" or layer in self.skip_layers else name

        try:
            return [
                KVFormat(
                    code(self.key, layer), code(self.value, layer), num_kv_heads, head_dim, self.block_size, key_words
                )
                for layer in range(num_layers)
            ]
        except ValueError as error:
            raise ConfigError(f"--kv-cache-dtype {self.key}, {self.value}: {error}") from None
