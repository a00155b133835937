"""Keys and values stored in the model's compute dtype, as they are.

Knows nothing of scales: there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from servd.kv_dtypes.base import KV_DTYPES, KVDtype


@KV_DTYPES.register("auto")
class AutoKVDtype(KVDtype):
    """[num_blocks, 2, num_kv_heads, block_size, head_dim] a layer; index 0 of the second axis is K, 1 is V."""

    @property
    def block_bytes(self) -> int:
        spec = self.spec
        elements = 2 * spec.num_kv_heads * spec.block_size * spec.head_dim
        return spec.num_layers * elements * spec.dtype.itemsize

    def allocate(self, num_blocks: int) -> list[Tensor]:
        spec = self.spec
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        # Not zeroed: pages that no request ever touches then cost no memory, and start-up no time.
        return [torch.empty(shape, dtype=spec.dtype, device=spec.device) for _ in range(spec.num_layers)]
