"""Owns the Triton choice of pages: scores by tiles of pages, then the top-k of each row by bisection of the bits.
Does not know how the bounds were made, nor what attention does with the pages."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from servd_kernels.kv_format import KVFormat
from servd_kernels.select_pages.reference import check_values
from servd_kernels.triton_support import INTERPRETED, POINTERS, CompileCase, unsupported

_TILE = 4096  # numbers of bounds that a program holds at a time
_MAX_ROW = 4096  # scores that a program holds at a time


def supports(device: str, dtype: torch.dtype, *, kv_format: KVFormat, **axes: object) -> str | None:
    if kv_format.head_dim > _TILE:
        return f"head_dim must be at most {_TILE}, not {kv_format.head_dim}"
    return unsupported(device, dtype)


@triton.jit
def _score_kernel(
    q, bounds, seq_lens, block_tables, scores, max_blocks, q_token, q_head, kv_heads, top_k,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, PAGES: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.cdiv(tl.load(seq_lens + request), BLOCK_SIZE)
    first = tl.program_id(2) * PAGES
    if (first >= count) | (count <= top_k):  # then all pages are taken, whatever they score
        return
    page, column = first + tl.arange(0, PAGES), tl.arange(0, DIMS)
    in_head = column < HEAD_DIM
    block = tl.load(block_tables + request * max_blocks + page, mask=page < count, other=0).to(tl.int64)
    mask = (page < count)[:, None] & in_head[None, :]
    places = bounds + ((block * kv_heads + head) * (2 * HEAD_DIM))[:, None] + column[None, :]
    least = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    most = tl.load(places + HEAD_DIM, mask=mask, other=0.0).to(tl.float32)
    score = tl.full((PAGES,), float("-inf"), tl.float32)
    for h in range(HEADS):
        x = tl.load(q + request * q_token + (head * HEADS + h) * q_head + column, mask=in_head, other=0.0)
        low, high = x.to(tl.float32)[None, :] * least, x.to(tl.float32)[None, :] * most
        total = tl.sum(tl.where((low > high) | (low != low), low, high), 1)
        score = tl.maximum(score, tl.where(total == total, total, float("inf")))
    # As signed integers in the order of the floats; above them all what is kept whatever it scores.
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where((page == 0) | (page == count - 1), 0x7FFFFFFF, ordered)
    row = request * kv_heads + head
    tl.store(scores + row * max_blocks + page, ordered, mask=page < count)


@triton.jit
def _load_scores(scores, page, count):
    """As integers from 1 up in the same order; 0 where there is no page."""
    ordered = tl.load(scores + page, mask=page < count, other=-2147483648)
    return ordered.to(tl.int64) + 2147483648


@triton.jit
def _choose_kernel(
    scores, seq_lens, pages, max_blocks, kv_heads, top_k, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.cdiv(tl.load(seq_lens + row // kv_heads), BLOCK_SIZE)
    scores += row * max_blocks
    pages += row * top_k
    column = tl.arange(0, BLOCK)
    if count <= top_k:
        for first in range(0, top_k, BLOCK):
            page = first + column
            tl.store(pages + page, tl.where(page < count, page, -1), mask=page < top_k)
        return
    # The top_k-th score: the greatest number that at least top_k scores reach, bit by bit from above.
    threshold = tl.zeros((), tl.int64)
    bit = tl.full((), 2147483648, tl.int64)
    for _ in range(32):
        reached = tl.zeros((), tl.int32)
        for first in range(0, count, BLOCK):
            reached += tl.sum((_load_scores(scores, first + column, count) >= threshold + bit).to(tl.int32))
        threshold = tl.where(reached >= top_k, threshold + bit, threshold)
        bit = bit // 2
    above = tl.zeros((), tl.int32)
    for first in range(0, count, BLOCK):
        above += tl.sum((_load_scores(scores, first + column, count) > threshold).to(tl.int32))
    equal, written = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for first in range(0, count, BLOCK):
        score = _load_scores(scores, first + column, count)
        is_equal = (score == threshold).to(tl.int32)
        # Of equal scores the lower pages, as many as are still to be had.
        is_early = equal + tl.cumsum(is_equal, 0) <= top_k - above
        is_chosen = (score > threshold) | ((is_equal > 0) & is_early)
        place = written + tl.cumsum(is_chosen.to(tl.int32), 0) - 1
        tl.store(pages + place, first + column, mask=is_chosen)
        equal += tl.sum(is_equal)
        written += tl.sum(is_chosen.to(tl.int32))


def _score_constants(kv_format: KVFormat, num_q_heads: int) -> dict[str, Any]:
    dims = triton.next_power_of_2(kv_format.head_dim)
    return {
        "HEAD_DIM": kv_format.head_dim,
        "BLOCK_SIZE": kv_format.block_size,
        "HEADS": num_q_heads // kv_format.num_kv_heads,
        "PAGES": _TILE // dims,
        "DIMS": dims,
    }


def _row_block(max_blocks: int) -> int:
    return int(min(_MAX_ROW, max(64, triton.next_power_of_2(max_blocks))))


def run(
    q: torch.Tensor,
    bounds: torch.Tensor,
    kv_format: KVFormat,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    if INTERPRETED:  # on a GPU the check would wait for the device
        check_values(len(bounds), kv_format.block_size, seq_lens, block_tables)
    num_reqs, max_blocks, kv_heads = len(q), block_tables.shape[1], kv_format.num_kv_heads
    pages = torch.empty(num_reqs, kv_heads, top_k, dtype=torch.int32, device=q.device)
    if not num_reqs:
        return pages
    scores = torch.empty(num_reqs * kv_heads, max_blocks, dtype=torch.int32, device=q.device)
    constants = _score_constants(kv_format, q.shape[1])
    if max_blocks > top_k:
        _score_kernel[(num_reqs, kv_heads, triton.cdiv(max_blocks, constants["PAGES"]))](
            q, bounds, seq_lens, block_tables, scores, max_blocks, q.stride(0), q.stride(1), kv_heads, top_k,
            num_warps=4, **constants,
        )  # fmt: skip
    block = _row_block(max_blocks)
    _choose_kernel[(num_reqs * kv_heads,)](
        scores, seq_lens, pages, max_blocks, kv_heads, top_k,
        BLOCK_SIZE=kv_format.block_size, BLOCK=block, num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    return pages


def compile_cases() -> Iterator[CompileCase]:
    """Llama-3-8B and the starter model, bounds in bfloat16, contexts of 8 and 128 thousand tokens."""
    bfloat16 = POINTERS[torch.bfloat16]
    for num_q_heads, kv_heads, head_dim in ((32, 8, 128), (9, 3, 64)):
        yield CompileCase(
            name=f"scores {num_q_heads}/{kv_heads}x{head_dim}",
            kernel=_score_kernel,
            signature={"q": bfloat16, "bounds": bfloat16, "seq_lens": "*i32", "block_tables": "*i32", "scores": "*i32"}
            | dict.fromkeys(("max_blocks", "q_token", "q_head", "kv_heads", "top_k"), "i32"),
            constants=_score_constants(KVFormat("bfloat16", "bfloat16", kv_heads, head_dim, 16), num_q_heads),
            num_warps=4,
        )
    for max_blocks in (512, 8192):
        block = _row_block(max_blocks)
        yield CompileCase(
            name=f"choice of {max_blocks}",
            kernel=_choose_kernel,
            signature=dict.fromkeys(("scores", "seq_lens", "pages"), "*i32")
            | dict.fromkeys(("max_blocks", "kv_heads", "top_k"), "i32"),
            constants={"BLOCK_SIZE": 16, "BLOCK": block},
            num_warps=min(8, max(1, block // 256)),
        )
