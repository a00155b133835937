"""Owns the plain torch choice of pages that every backend is held to, and what is said of arrays that do not fit.
Does not know speed: it works request by request, so that a row's pages do not depend on the batch."""

from typing import Any

import torch

from servd_kernels.kv_format import KVFormat

FAULTS = {  # the codes are those of `check` in cpu.cpp
    1: "seq_lens must be 0 or more",
    2: "block_tables has too few columns for a seq_len",
    3: "block_tables holds an id outside the cache",
}


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def check_values(num_blocks: int, block_size: int, seq_lens: torch.Tensor, block_tables: torch.Tensor) -> None:
    """Raises ValueError with one of FAULTS. Reads the arrays on the host: on a GPU that waits for the device."""
    for request, length in enumerate(seq_lens.tolist()):
        count = -(-length // block_size)
        if length < 0:
            raise ValueError(FAULTS[1])
        if count > block_tables.shape[1]:
            raise ValueError(FAULTS[2])
        used = block_tables[request, :count]
        if bool(((used < 0) | (used >= num_blocks)).any()):
            raise ValueError(FAULTS[3])


def score(q: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """q [num_q_heads, head_dim], bounds [num_pages, num_kv_heads, 2, head_dim] -> [num_pages, num_kv_heads]."""
    grouped = q.float().view(bounds.shape[1], -1, 1, q.shape[-1])
    products = grouped * bounds.float()[:, :, None]  # [num_pages, num_kv_heads, group, 2, head_dim]
    return products.amax(3).sum(-1).nan_to_num(torch.inf, torch.inf, -torch.inf).amax(-1)


def run(
    q: torch.Tensor,
    bounds: torch.Tensor,
    kv_format: KVFormat,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    check_values(len(bounds), kv_format.block_size, seq_lens, block_tables)
    shape = (len(q), kv_format.num_kv_heads, top_k)
    pages = torch.full(shape, -1, dtype=torch.int32, device=q.device)
    for request, length in enumerate(seq_lens.tolist()):
        count = -(-length // kv_format.block_size)
        scores = score(q[request], bounds[block_tables[request, :count].long()]).double()
        scores = scores.clamp(max=1e300)  # below what is kept whatever it scores
        scores[:1] = scores[-1:] = torch.inf
        order = scores.sort(dim=0, descending=True, stable=True).indices[:top_k]
        pages[request, :, : len(order)] = order.sort(0).values.T.to(torch.int32)
    return pages


def make_inputs(
    seq_lens: list[int],
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    top_k: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    bounds_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Blocks lie shuffled; the bounds of those that belong to no request are NaN; the rest of a table is block 0."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(counts) + 2
    ids = 1 + torch.randperm(num_blocks - 1, generator=generator)
    tables = torch.zeros(len(seq_lens), max(counts, default=0) + 1, dtype=torch.int32)
    taken = 0
    for request, count in enumerate(counts):
        tables[request, :count] = ids[taken : taken + count]
        taken += count
    ends = torch.randn(num_blocks, num_kv_heads, 2, head_dim, generator=generator).sort(2).values
    ends[0] = ends[ids[taken:]] = torch.nan
    return {
        "q": torch.randn(len(seq_lens), num_q_heads, head_dim, generator=generator).to(dtype),
        "bounds": ends.to(bounds_dtype),
        "kv_format": KVFormat("float32", "float32", num_kv_heads, head_dim, block_size),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "block_tables": tables,
        "top_k": top_k,
    }
