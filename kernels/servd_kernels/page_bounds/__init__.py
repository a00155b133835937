"""Owns the bounds of each page's keys, kept for the choice of pages (Quest, Tang et al. 2024, https://arxiv.org/abs/2406.10774).
Does not know how pages are chosen (select_pages)."""

import torch

from servd_kernels.kv_format import KVFormat
from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

OP = Op("page_bounds")


def page_bounds(
    kv_cache: torch.Tensor,
    kv_format: KVFormat,
    slot_mapping: torch.Tensor,
    bounds: torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """Brings the bounds of all pages that slot_mapping writes to up to date, IN PLACE; returns them.

    kv_cache [num_blocks, block_bytes] of kv_format, this step's keys written; slot_mapping [num_tokens] int64, slot =
    block * block_size + offset, -1: none; the tokens of a page stand side by side, in order, as a packed step has
    them. bounds [num_blocks, num_kv_heads, 2, head_dim] float32 or bfloat16: the least and the greatest number of each
    channel among the page's keys, as attention sees them (decoded; rotated if the code is), in bfloat16 rounded
    outwards; NaN where a key is NaN. They are taken anew from the page's first slot to the last one written, so that
    they are a function of its keys alone: not of chunks, of drafts that were taken back, or of who had the block
    before; for a block that was copied or swapped in, pass its last slot. Raises ValueError for shapes, dtypes or
    slots that do not fit.
    """
    kv_format.check(kv_cache)
    shape = (len(kv_cache), kv_format.num_kv_heads, 2, kv_format.head_dim)
    if bounds.shape != shape or bounds.dtype not in (torch.float32, torch.bfloat16) or not bounds.is_contiguous():
        raise ValueError(
            f"bounds must be contiguous float32 or bfloat16 {list(shape)}, not {bounds.dtype} {list(bounds.shape)}"
        )
    if slot_mapping.dim() != 1 or slot_mapping.dtype != torch.int64:
        raise ValueError(f"slot_mapping must be int64 [num_tokens], not {slot_mapping.dtype} {slot_mapping.shape}")
    check_last_stride(slot_mapping=slot_mapping)
    run = OP.bind(kv_cache.device.type, bounds.dtype, backend, kv_format=kv_format)
    out: torch.Tensor = run(kv_cache, kv_format, slot_mapping, bounds)
    return out
