"""Owns what the ops that move blocks share: the check of a cache's layers, and their addresses as a tensor.
Does not know what a block holds."""

import torch


def check_layers(name: str, kv_caches: list[torch.Tensor]) -> None:
    """Raises ValueError, naming `name`, unless all layers have the same number of contiguous blocks on one device."""
    first = kv_caches[0]
    for cache in kv_caches:
        if cache.dim() < 2 or len(cache) != len(first) or cache.device != first.device:
            raise ValueError(
                f"{name} must be [num_blocks, ...] with one num_blocks on one device, not {list(cache.shape)} on "
                f"{cache.device} and {list(first.shape)} on {first.device}"
            )
        if len(cache) and not cache[0].is_contiguous():
            raise ValueError(f"{name} must have contiguous blocks, not strides {list(cache.stride())}")


def check_ids(src: torch.Tensor, dst: torch.Tensor) -> None:
    """Raises ValueError unless src and dst are block ids [n] int64, none of them twice in dst."""
    if src.dim() != 1 or src.shape != dst.shape:
        raise ValueError(f"src and dst must be [n], not {list(src.shape)} and {list(dst.shape)}")
    if src.dtype != torch.int64 or dst.dtype != torch.int64:
        raise ValueError(f"src and dst must be int64, not {src.dtype} and {dst.dtype}")
    if len(set(dst.tolist())) != len(dst):
        raise ValueError(f"a block of dst must not repeat: {dst.tolist()}")


def check_range(ids: torch.Tensor, num_blocks: int) -> None:
    """Raises ValueError for an id outside 0..num_blocks - 1. Reads the ids: on a GPU that waits for the device."""
    if bool(((ids < 0) | (ids >= num_blocks)).any()):
        raise ValueError(f"block ids must be in 0..{num_blocks - 1}, not {ids.tolist()}")


def bytes_of_blocks(kv_caches: list[torch.Tensor]) -> list[int]:
    """Of each layer, the bytes of one block."""
    return [cache.element_size() * cache.shape[1:].numel() for cache in kv_caches]


def places(kv_caches: list[torch.Tensor]) -> list[int]:
    """The address of each layer, then of each layer the bytes from one block to the next."""
    addresses = [cache.data_ptr() for cache in kv_caches]
    return addresses + [cache.stride(0) * cache.element_size() for cache in kv_caches]
