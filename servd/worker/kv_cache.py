"""The worker's KV memory: how many blocks fit, their tensors, and copies between them.

Knows nothing of which request has which block, nor of how a block is laid out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from servd_kernels.copy_blocks import OP as COPY_BLOCKS
from servd_kernels.kv_format import KVFormat

from servd.errors import ConfigError


class PagedKVCache:
    """KV blocks of all layers. Block 0 is the null block; what no request has written is undefined and never read."""

    def __init__(self, formats: Sequence[KVFormat], num_blocks: int, device: torch.device) -> None:
        """`formats`: of each layer; all of one block size."""
        self.block_size = formats[0].block_size
        self.block_bytes = sum(kv_format.block_bytes for kv_format in formats)
        self.num_blocks = num_blocks
        # Not zeroed: pages that no request ever touches then cost no memory, and start-up no time.
        self.layers = [kv_format.allocate(num_blocks, device) for kv_format in formats]  # [num_blocks, block_bytes]
        self._device = device
        self._copy = COPY_BLOCKS.bind(device=device.type, dtype=torch.uint8)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination), in every layer."""
        if pairs:
            sources, destinations = torch.tensor(pairs, dtype=torch.int64, device=self._device).unbind(1)
            self._copy(self.layers, sources.contiguous(), destinations.contiguous())


def num_blocks_for(memory: int, block_bytes: int, block_size: int, max_model_len: int, max_num_seqs: int) -> int:
    """Blocks to allocate in `memory` bytes, the null block included: no more than the requests can ever fill.

    Raises ConfigError if not even one request of `max_model_len` tokens fits.
    """
    blocks_per_request = -(-max_model_len // block_size)
    fitting = memory // block_bytes
    if fitting < blocks_per_request + 1:
        needed = (blocks_per_request + 1) * block_bytes
        possible = max(0, fitting - 1) * block_size
        raise ConfigError(
            f"one request of --max-model-len {max_model_len} tokens needs {_mib(needed)} of KV cache, "
            f"--kv-cache-memory gives {_mib(memory)}; raise --kv-cache-memory, or lower --max-model-len to {possible}"
        )
    return int(min(fitting, max_num_seqs * blocks_per_request + 1))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"
