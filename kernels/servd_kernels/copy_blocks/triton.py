"""Owns the Triton block copy: one launch for all layers, one program for a stretch of one block.
Does not know what a block holds."""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from servd_kernels.block_sets import bytes_of_blocks, check_range, places
from servd_kernels.triton_support import INTERPRETED, CompileCase, unsupported

_BLOCK = 2048  # words of a program


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    # Bytes are moved as they are: any dtype will do.
    return unsupported(device, torch.float32)


@triton.jit
def copy_kernel(table, src, dst, layers, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr):
    """table [5, layers] int64: addresses and strides of the source, then of the destination, and bytes of a block."""
    i, layer = tl.program_id(0), tl.program_id(1)
    source = tl.load(table + layer) + tl.load(src + i) * tl.load(table + layers + layer)
    target = tl.load(table + 2 * layers + layer) + tl.load(dst + i) * tl.load(table + 3 * layers + layer)
    size = tl.load(table + 4 * layers + layer)
    if ALIGNMENT == 16:
        source = tl.multiple_of(source, 16)
        target = tl.multiple_of(target, 16)
        size = tl.multiple_of(size, 16)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if ALIGNMENT >= 4:
        words = tl.load(source.to(tl.pointer_type(tl.int32)) + column, mask=column < size // 4)
        tl.store(target.to(tl.pointer_type(tl.int32)) + column, words, mask=column < size // 4)
    else:
        bytes = tl.load(source.to(tl.pointer_type(tl.int8)) + column, mask=column < size)
        tl.store(target.to(tl.pointer_type(tl.int8)) + column, bytes, mask=column < size)


@functools.lru_cache(maxsize=16)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # Kept: a worker's caches stay where they are, and the transfer would wait for the device.
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def launch(
    source: list[torch.Tensor], target: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor, device: torch.device
) -> None:
    """Copies block src[i] of the source layers onto block dst[i] of the target layers; all reachable from device."""
    sizes = bytes_of_blocks(source)
    if not len(src) or not any(sizes):
        return
    numbers = (*places(source), *places(target), *sizes)
    alignment = 16 if all(number % 16 == 0 for number in numbers) else 4
    if any(number % alignment for number in numbers):
        alignment = 1
    chunks = triton.cdiv(max(sizes), _BLOCK * min(4, alignment))
    copy_kernel[(len(src), len(source), chunks)](
        _on_device(numbers, device), src.contiguous(), dst.contiguous(), len(source),
        ALIGNMENT=alignment, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def run(kv_caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    if not kv_caches:
        return
    if INTERPRETED:  # on a GPU the check would wait for the device
        check_range(src, len(kv_caches[0]))
        check_range(dst, len(kv_caches[0]))
    launch(kv_caches, kv_caches, src, dst, kv_caches[0].device)


def compile_cases() -> Iterator[CompileCase]:
    """Blocks of 16 tokens, which are aligned at every head size, and bytes that are not."""
    for alignment in (16, 4, 1):
        yield CompileCase(
            name=f"alignment {alignment}",
            kernel=copy_kernel,
            signature=dict.fromkeys(("table", "src", "dst"), "*i64") | {"layers": "i32"},
            constants={"ALIGNMENT": alignment, "BLOCK": _BLOCK},
            num_warps=4,
        )
