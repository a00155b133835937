"""Owns the plain torch block copy that every backend is held to.
Does not know speed."""

from typing import Any

import torch

from servd_kernels.block_sets import check_range


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(kv_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    for cache in kv_caches:
        check_range(src, len(cache))
        check_range(dst, len(cache))
    for cache in kv_caches:
        cache[dst] = cache[src]


def make_inputs(
    block_numels: list[int], num_blocks: int, copies: int, dtype: torch.dtype = torch.uint8, seed: int = 0
) -> dict[str, Any]:
    """A layer for each of block_numels; their bytes are random."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(num_blocks, generator=generator)
    sizes = [numel * dtype.itemsize for numel in block_numels]
    caches = [
        torch.randint(0, 256, (num_blocks, size), dtype=torch.uint8, generator=generator).view(dtype)
        for size in sizes
    ]
    return {"kv_caches": caches, "src": ids[:copies].clone(), "dst": ids[copies : 2 * copies].clone()}
