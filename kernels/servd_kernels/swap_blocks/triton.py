"""Owns the block swap in one Triton launch: the kernel reaches pinned host memory over the bus (unified addresses).
Does not know what a block holds. It takes processors, which copy engines do not, but small blocks by the thousand."""

from collections.abc import Iterator

import torch

from servd_kernels.block_sets import check_range
from servd_kernels.copy_blocks import triton as copy_triton
from servd_kernels.swap_blocks import check_pinned
from servd_kernels.triton_support import INTERPRETED, CompileCase, unsupported


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    # Bytes are moved as they are: any dtype will do.
    return unsupported(device, torch.float32)


def run(
    src_caches: list[torch.Tensor], dst_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor
) -> None:
    if not src_caches:
        return
    check_range(src, len(src_caches[0]))
    check_range(dst, len(dst_caches[0]))
    device = dst_caches[0].device if dst_caches[0].device.type != "cpu" else src_caches[0].device
    if not INTERPRETED:
        check_pinned(src_caches + dst_caches)
        src, dst = src.to(device, non_blocking=True), dst.to(device, non_blocking=True)
    copy_triton.launch(src_caches, dst_caches, src, dst, device)


def compile_cases() -> Iterator[CompileCase]:
    """The kernel is that of copy_blocks."""
    yield from copy_triton.compile_cases()
