"""Owns the block swap by a GPU's copy engines, which leave its processors to the step that runs: one asynchronous
copy a layer and run of neighbouring blocks. Does not know what a block holds; the bytes are exact."""

from collections.abc import Iterator

import torch

from servd_kernels.block_sets import check_range
from servd_kernels.swap_blocks import check_pinned


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None if torch.device(device).type != "cpu" else "it drives the copy engines of a GPU, not cpu"


def runs(src: list[int], dst: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first source, first destination, length) of the stretches where both ids go up by one."""
    begin = 0
    for i in range(1, len(src) + 1):
        if i == len(src) or src[i] != src[i - 1] + 1 or dst[i] != dst[i - 1] + 1:
            yield src[begin], dst[begin], i - begin
            begin = i


def run(
    src_caches: list[torch.Tensor], dst_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor
) -> None:
    if not src_caches or not len(src):
        return
    if src_caches[0].device.type != dst_caches[0].device.type:
        check_pinned(src_caches + dst_caches)
    check_range(src, len(src_caches[0]))
    check_range(dst, len(dst_caches[0]))
    stretches = list(runs(src.tolist(), dst.tolist()))
    for source, target in zip(src_caches, dst_caches, strict=True):
        for first, onto, length in stretches:
            target[onto : onto + length].copy_(source[first : first + length], non_blocking=True)
