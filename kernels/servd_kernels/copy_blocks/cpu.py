"""Owns the call of the native block copy.
Does not know threads (cpu.cpp)."""

import torch

from servd_kernels import native

_KERNEL = native.Function("copy_blocks", "plppllll")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    # Bytes are moved as they are: any dtype will do.
    return native.unsupported(device, torch.float32)


def run(kv_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    if not kv_caches:
        return
    first = kv_caches[0]
    caches = torch.tensor([cache.data_ptr() for cache in kv_caches], dtype=torch.int64)
    size = first.element_size()
    block_bytes = first[0].numel() * size
    src, dst = src.contiguous(), dst.contiguous()
    fault = _KERNEL.call(
        caches.data_ptr(), len(kv_caches), src.data_ptr(), dst.data_ptr(), len(src), len(first),
        block_bytes, first.stride(0) * size,
    )  # fmt: skip
    if fault:
        raise ValueError(f"block ids must be in 0..{len(first) - 1}, not {src.tolist()} and {dst.tolist()}")
