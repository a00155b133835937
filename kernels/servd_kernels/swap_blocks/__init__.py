"""Owns exact copies of whole KV blocks between two caches: of the device and of the host, or of two hosts.
Does not know what a block holds, nor when a request is swapped out (Kwon et al. 2023, https://arxiv.org/abs/2309.06180)."""

import torch

from servd_kernels.block_sets import bytes_of_blocks, check_ids, check_layers
from servd_kernels.registry import Op

OP = Op("swap_blocks")


def swap_blocks(
    src_caches: list[torch.Tensor],
    dst_caches: list[torch.Tensor],
    src: torch.Tensor,
    dst: torch.Tensor,
    backend: str | None = None,
) -> None:
    """Copies block src[i] of src_caches onto block dst[i] of dst_caches, in every layer.

    src_caches, dst_caches: layers [num_blocks, ...] of any dtype, each block contiguous; the two may differ in
    num_blocks, and the layers in the bytes of a block, but a layer has the same in both. Each cache lies on one
    device; a host's memory is pinned where the other side is a GPU. No memory may be in both. src, dst [n] int64 on
    the host, none twice in dst. With a GPU the copies run in its current stream, after what was enqueued there:
    synchronize before the host reads them. Raises ValueError for what does not fit, before any copy.
    """
    check_ids(src, dst)
    if len(src_caches) != len(dst_caches):
        raise ValueError(f"dst_caches must be {len(src_caches)} layers like src_caches, not {len(dst_caches)}")
    if not src_caches:
        return
    check_layers("src_caches", src_caches)
    check_layers("dst_caches", dst_caches)
    sizes, others = bytes_of_blocks(src_caches), bytes_of_blocks(dst_caches)
    if sizes != others:
        raise ValueError(f"dst_caches must have blocks of {sizes} bytes like src_caches, not {others}")
    kinds = {src_caches[0].device.type, dst_caches[0].device.type}
    device = next((kind for kind in sorted(kinds) if kind != "cpu"), "cpu")
    OP.bind(device, src_caches[0].dtype, backend)(src_caches, dst_caches, src, dst)


def check_pinned(caches: list[torch.Tensor]) -> None:
    """Raises ValueError for host memory that a GPU cannot reach, or only by waiting."""
    for cache in caches:
        if cache.device.type == "cpu" and not cache.is_pinned():
            raise ValueError("a host cache is not pinned; allocate it with pin_memory=True to swap with a GPU")
