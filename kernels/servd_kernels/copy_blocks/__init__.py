"""Owns exact copies of whole KV blocks, in all layers at once (copy-on-write, forks; Kwon et al. 2023, PagedAttention,
https://arxiv.org/abs/2309.06180). Does not know what a block holds, nor who owns it."""

import torch

from servd_kernels.block_sets import check_ids, check_layers
from servd_kernels.registry import Op

OP = Op("copy_blocks")


def copy_blocks(
    kv_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor, backend: str | None = None
) -> None:
    """Copies block src[i] onto block dst[i] in every cache.

    kv_caches: layers [num_blocks, ...] of any dtype, each block contiguous; the layers may differ in the bytes of a
    block (layers that keep full precision do). src, dst [n] int64, on the caches' device. No block may be in both,
    nor twice in dst: the order of the copies is free. Raises ValueError for what does not fit, before any copy; the
    kernels themselves, bound without this function, leave the range of the ids unchecked on a GPU.
    """
    check_ids(src, dst)
    if set(dst.tolist()) & set(src.tolist()):
        raise ValueError("a block of dst must not be in src")
    if not kv_caches:
        return
    check_layers("kv_caches", kv_caches)
    first = kv_caches[0]
    OP.bind(first.device.type, first.dtype, backend)(kv_caches, src, dst)
