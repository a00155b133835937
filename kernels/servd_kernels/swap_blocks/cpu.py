"""Owns the call of the native block swap.
Does not know threads (cpu.cpp)."""

import torch

from servd_kernels import native
from servd_kernels.block_sets import bytes_of_blocks, places

_KERNEL = native.Function("swap_blocks", "pplpplplppl")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    # Bytes are moved as they are: any dtype will do.
    return native.unsupported(device, torch.float32)


def run(
    src_caches: list[torch.Tensor], dst_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor
) -> None:
    if not src_caches:
        return
    src_blocks, dst_blocks, layers = len(src_caches[0]), len(dst_caches[0]), len(src_caches)
    numbers = places(src_caches) + places(dst_caches) + bytes_of_blocks(src_caches)
    table = torch.tensor(numbers, dtype=torch.int64).view(5, layers)
    source, source_strides, target, target_strides, block_bytes = (row.data_ptr() for row in table)
    src, dst = src.contiguous(), dst.contiguous()
    fault = _KERNEL.call(
        source, source_strides, src_blocks, target, target_strides, dst_blocks, block_bytes, layers,
        src.data_ptr(), dst.data_ptr(), len(src),
    )  # fmt: skip
    if fault:
        raise ValueError(
            f"block ids must be in 0..{src_blocks - 1} and 0..{dst_blocks - 1}, not {src.tolist()} and {dst.tolist()}"
        )
