"""Owns the call of the native block copy.
Does not know threads (cpu.cpp)."""

import torch

from servd_kernels import native
from servd_kernels.block_sets import bytes_of_blocks, places

_KERNEL = native.Function("copy_blocks", "pppllppl")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    # Bytes are moved as they are: any dtype will do.
    return native.unsupported(device, torch.float32)


def run(kv_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    if not kv_caches:
        return
    num_blocks, layers = len(kv_caches[0]), len(kv_caches)
    table = torch.tensor(places(kv_caches) + bytes_of_blocks(kv_caches), dtype=torch.int64).view(3, layers)
    addresses, strides, block_bytes = (row.data_ptr() for row in table)
    src, dst = src.contiguous(), dst.contiguous()
    fault = _KERNEL.call(
        addresses, strides, block_bytes, layers, num_blocks, src.data_ptr(), dst.data_ptr(), len(src)
    )  # fmt: skip
    if fault:
        raise ValueError(f"block ids must be in 0..{num_blocks - 1}, not {src.tolist()} and {dst.tolist()}")
