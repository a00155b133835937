"""How many KV blocks fit, and copies between them."""

from __future__ import annotations

import pytest
import torch
from servd_kernels.kv_format import KVFormat

from servd.errors import ConfigError
from servd.worker.kv_cache import PagedKVCache, num_blocks_for


def test_memory_decides_the_number_of_blocks() -> None:
    assert num_blocks_for(1000, 10, block_size=16, max_model_len=64, max_num_seqs=100) == 100


def test_no_more_blocks_than_the_requests_can_fill() -> None:
    # 3 requests of 5 blocks each, and the null block
    assert num_blocks_for(10**9, 10, block_size=16, max_model_len=65, max_num_seqs=3) == 16


def test_one_request_of_the_longest_length_must_fit() -> None:
    assert num_blocks_for(60, 10, block_size=16, max_model_len=65, max_num_seqs=3) == 6
    with pytest.raises(ConfigError, match=r"--max-model-len 65 .*--kv-cache-memory.*lower --max-model-len to 64") as e:
        num_blocks_for(59, 10, block_size=16, max_model_len=65, max_num_seqs=3)
    assert "\n" not in e.value.message


def test_copies_move_whole_blocks_in_every_layer() -> None:
    kv_format = KVFormat("bfloat16", "bfloat16", num_kv_heads=2, head_dim=8, block_size=5)
    cache = PagedKVCache([kv_format] * 3, 7, torch.device("cpu"))
    for number, layer in enumerate(cache.layers):
        layer.copy_(torch.arange(layer.numel()).view_as(layer) % 250 + number)
    before = [layer.clone() for layer in cache.layers]
    cache.copy_blocks([(1, 4), (6, 2)])
    cache.copy_blocks([])
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer[4], old[1]) and torch.equal(layer[2], old[6])
        for untouched in (0, 1, 3, 5, 6):
            assert torch.equal(layer[untouched], old[untouched])
