"""Owns exact copies of whole KV blocks, in all layers at once (copy-on-write, forks).
Does not know what a block holds, nor who owns it."""

import torch

from servd_kernels.registry import Op

OP = Op("copy_blocks")


def copy_blocks(
    kv_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor, backend: str | None = None
) -> None:
    """Copies block src[i] onto block dst[i] in every cache.

    kv_caches: layers of one shape [num_blocks, ...], strides and dtype (any), each block contiguous; src, dst [n]
    int64. No block may be in both, nor twice in dst: the order of the copies is free. Raises ValueError.
    """
    if src.dim() != 1 or src.shape != dst.shape:
        raise ValueError(f"src and dst must be [n], not {list(src.shape)} and {list(dst.shape)}")
    if src.dtype != torch.int64 or dst.dtype != torch.int64:
        raise ValueError(f"src and dst must be int64, not {src.dtype} and {dst.dtype}")
    targets = set(dst.tolist())
    if len(targets) != len(dst) or targets & set(src.tolist()):
        raise ValueError("a block of dst must not repeat, nor be in src")
    if not kv_caches:
        return
    first = kv_caches[0]
    for cache in kv_caches:
        if cache.shape != first.shape or cache.dtype != first.dtype:
            raise ValueError(f"kv_caches must be alike: {list(cache.shape)} and {list(first.shape)}")
        if cache.stride() != first.stride() or (len(cache) and not cache[0].is_contiguous()):
            raise ValueError(f"kv_caches must have contiguous blocks and equal strides, not {list(cache.stride())}")
    OP.bind(first.device.type, first.dtype, backend)(kv_caches, src, dst)
