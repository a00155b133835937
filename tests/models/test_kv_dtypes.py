"""The contract of KV storage types, over all registered ones.

Knows nothing of kernels.
"""

from __future__ import annotations

import pytest
import torch

from servd.errors import ConfigError
from servd.kv_dtypes.base import KV_DTYPES, KVCacheSpec


def spec(dtype: torch.dtype = torch.bfloat16) -> KVCacheSpec:
    return KVCacheSpec(num_layers=3, num_kv_heads=2, head_dim=24, block_size=8, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("name", KV_DTYPES.discover())
def test_block_bytes_is_what_allocate_takes(name: str) -> None:
    kv_dtype = KV_DTYPES.get(name)(spec())
    tensors = kv_dtype.allocate(5)
    assert len(tensors) == 3 and all(tensor.shape[0] == 5 for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) == 5 * kv_dtype.block_bytes


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_auto_is_the_compute_dtype(dtype: torch.dtype, size: int) -> None:
    kv_dtype = KV_DTYPES.get("auto")(spec(dtype))
    assert kv_dtype.block_bytes == 3 * 2 * 2 * 8 * 24 * size
    (tensor, *_) = kv_dtype.allocate(4)
    assert tensor.dtype == dtype and tensor.shape == (4, 2, 2, 8, 24)


def test_unknown_dtype_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown KV cache dtype 'fp3'; known: auto"):
        KV_DTYPES.get("fp3")
