"""Owns the choice of the pages that a decode reads (Quest, Tang et al. 2024, https://arxiv.org/abs/2406.10774).
Does not know how the bounds were made (page_bounds), nor what attention does with the pages."""

import torch

from servd_kernels.kv_format import KVFormat
from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

OP = Op("select_pages")


def select_pages(
    q: torch.Tensor,
    bounds: torch.Tensor,
    kv_format: KVFormat,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    top_k: int,
    backend: str | None = None,
) -> torch.Tensor:
    """The pages of each request and kv head whose keys can score highest: [num_reqs, num_kv_heads, top_k] int32,
    places in the block table, ascending, -1 after the last; what `paged_attention(pages=...)` takes.

    q [num_reqs, num_q_heads, head_dim] float32, bfloat16 or float16, as rope_and_cache leaves it (one query a
    request); bounds [num_blocks, num_kv_heads, 2, head_dim] float32 or bfloat16 of page_bounds; seq_lens [num_reqs]
    and block_tables [num_reqs, max_blocks] int32; top_k: 2 or more. A page scores the most that any query head of the
    group could have with a key within the page's bounds, sum_d max(q_d least_d, q_d greatest_d), in float32; NaN
    counts as infinity, so that it is seen. The first page (attention sinks) and the last (the newest tokens) are
    always kept; of equal scores the lower page goes first. A row's pages depend on that row alone. Raises ValueError
    for shapes, dtypes, lengths or block ids that do not fit.
    """
    requests, heads, dim = len(seq_lens), kv_format.num_kv_heads, kv_format.head_dim
    if q.dim() != 3 or q.shape[0] != requests or q.shape[2] != dim or q.shape[1] % heads:
        raise ValueError(f"q must be [{requests}, a multiple of {heads}, {dim}], not {list(q.shape)}")
    if bounds.dim() != 4 or bounds.shape[1:] != (heads, 2, dim) or bounds.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"bounds must be float32 or bfloat16 [num_blocks, {heads}, 2, {dim}], not {bounds.dtype} "
            f"{list(bounds.shape)}"
        )
    for name, tensor, shape in (
        ("seq_lens", seq_lens, (requests,)),
        ("block_tables", block_tables, (requests, block_tables.shape[-1])),
    ):
        if tensor.shape != shape or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")
    for name, tensor in (("bounds", bounds), ("block_tables", block_tables)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {list(tensor.stride())}")
    if top_k < 2:
        raise ValueError(f"top_k is {top_k}; allowed: 2 or more, for the first page and the last")
    check_last_stride(q=q, seq_lens=seq_lens)
    run = OP.bind(q.device.type, q.dtype, backend, kv_format=kv_format, num_q_heads=q.shape[1])
    pages: torch.Tensor = run(q, bounds, kv_format, seq_lens, block_tables, top_k)
    return pages
