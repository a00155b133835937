"""Owns the plain torch block swap that every backend is held to.
Does not know speed."""

from typing import Any

import torch

from servd_kernels.block_sets import check_range
from servd_kernels.copy_blocks import reference as copy_reference


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(
    src_caches: list[torch.Tensor], dst_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor
) -> None:
    for cache in src_caches:
        check_range(src, len(cache))
    for cache in dst_caches:
        check_range(dst, len(cache))
    for source, target in zip(src_caches, dst_caches, strict=True):
        target[dst.to(target.device)] = source[src.to(source.device)].to(target.device)


def make_inputs(
    block_numels: list[int],
    src_blocks: int,
    dst_blocks: int,
    copies: int,
    dtype: torch.dtype = torch.uint8,
    seed: int = 0,
) -> dict[str, Any]:
    """Two caches of random bytes with a layer for each of block_numels; copies <= both numbers of blocks."""
    source = copy_reference.make_inputs(block_numels, src_blocks, 0, dtype, seed)["kv_caches"]
    target = copy_reference.make_inputs(block_numels, dst_blocks, 0, dtype, seed + 1)["kv_caches"]
    generator = torch.Generator().manual_seed(seed)
    src = torch.randperm(src_blocks, generator=generator)[:copies]
    dst = torch.randperm(dst_blocks, generator=generator)[:copies]
    return {"src_caches": source, "dst_caches": target, "src": src, "dst": dst}
