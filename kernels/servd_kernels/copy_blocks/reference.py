"""Owns the plain torch block copy that every backend is held to.
Does not know speed."""

from typing import Any

import torch


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(kv_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    for cache in kv_caches:
        for ids in (src, dst):
            if bool(((ids < 0) | (ids >= len(cache))).any()):
                raise ValueError(f"block ids must be in 0..{len(cache) - 1}, not {ids.tolist()}")
        cache[dst] = cache[src]


def make_inputs(
    layers: int, num_blocks: int, block_numel: int, copies: int, dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(num_blocks, generator=generator)
    caches = [torch.randn(num_blocks, block_numel, generator=generator) for _ in range(layers)]
    return {
        "kv_caches": [cache.to(dtype) for cache in caches],
        "src": ids[:copies].clone(),
        "dst": ids[copies : 2 * copies].clone(),
    }
