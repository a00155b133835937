"""Owns the Triton paged attention: its kernels' grids and launch, and which requests each kernel takes.
Does not know the arithmetic (triton_softmax.py) or the order of keys (triton_tile.py), which give the same bits under
any grid. FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) over pages, with decodes split over keys
(Flash-Decoding) at fixed spans."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from servd_kernels.kv_format import KVFormat
from servd_kernels.paged_attention.faults import FAULTS, find_fault
from servd_kernels.paged_attention.options import PLAIN, AttentionOptions
from servd_kernels.paged_attention.triton_softmax import finish, merge
from servd_kernels.paged_attention.triton_spec import SPAN, Spec, Tiles, make_spec, tiles_for
from servd_kernels.paged_attention.triton_tile import attend_tile, seen_range, span_range, store_rows
from servd_kernels.triton_support import ARCHITECTURES, INTERPRETED, POINTERS, CompileCase, architecture, unsupported

MAX_HEAD_DIM = 256  # a tile's rows must fit the registers of one program
_MAX_SCRATCH = 256 << 20  # bytes; beyond it there are requests enough to fill a GPU without a split
_ALL_ROWS = 2**31 - 1
_SPAN = tl.constexpr(SPAN)


def supports(device: str, dtype: torch.dtype, *, kv_format: KVFormat, **axes: object) -> str | None:
    if kv_format.key_words:
        return "it reads keys as rows, not as words (key_words)"
    if kv_format.head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, not {kv_format.head_dim}"
    return unsupported(device, dtype)


@triton.jit
def _prefill_kernel(
    q, out, lse, partials, stats, keys, values, params, cu_seqlens_q, seq_lens, block_tables, pages,
    alibi_slopes, sink_logits, q_token, q_head, table_stride, num_q_heads, max_chosen, num_spans,
    scale, num_reqs, short_rows,
    SPEC: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, HAS_PAGES: tl.constexpr,
):  # fmt: skip
    """Grid [tiles, kv heads]: tile t belongs to the last request whose first tile, no later than
    rows before it / ROWS + requests before it, is at most t. Takes requests of more than short_rows rows."""
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles of a prompt see most: they begin first
    request = tl.program_id(0) * 0
    after = num_reqs
    while request + 1 < after:
        middle = (request + after) // 2
        is_reached = tl.load(cu_seqlens_q + middle) * SPEC.group // ROWS + middle <= number
        request = tl.where(is_reached, middle, request)
        after = tl.where(is_reached, after, middle)
    begin = tl.load(cu_seqlens_q + request)
    num_rows = (tl.load(cu_seqlens_q + request + 1) - begin) * SPEC.group
    tile = number - (begin * SPEC.group // ROWS + request)
    if (num_rows > short_rows) & (tile * ROWS < num_rows):
        attend_tile(
            (q, out, lse, partials, stats, keys, values, params, cu_seqlens_q, seq_lens, block_tables, pages),
            (alibi_slopes, sink_logits),
            (q_token, q_head, table_stride, num_q_heads, max_chosen, num_spans),
            request, tl.program_id(1), tile, 0, scale, SPEC, ROWS, SPLIT, HAS_PAGES,
        )  # fmt: skip


@triton.jit
def _decode_kernel(
    q, out, lse, partials, stats, keys, values, params, cu_seqlens_q, seq_lens, block_tables, pages,
    alibi_slopes, sink_logits, q_token, q_head, table_stride, num_q_heads, max_chosen, num_spans,
    scale, short_rows,
    SPEC: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, HAS_PAGES: tl.constexpr,
):  # fmt: skip
    """Grid [requests, kv heads, spans if SPLIT]. Takes requests of at most short_rows rows, one tile as a rule."""
    request = tl.program_id(0)
    num_queries = tl.load(cu_seqlens_q + request + 1) - tl.load(cu_seqlens_q + request)
    num_tiles = (num_queries * SPEC.group + ROWS - 1) // ROWS
    num_tiles = tl.where(num_queries * SPEC.group > short_rows, 0, num_tiles)
    for tile in range(num_tiles):
        attend_tile(
            (q, out, lse, partials, stats, keys, values, params, cu_seqlens_q, seq_lens, block_tables, pages),
            (alibi_slopes, sink_logits),
            (q_token, q_head, table_stride, num_q_heads, max_chosen, num_spans),
            request, tl.program_id(1), tile, tl.program_id(2), scale, SPEC, ROWS, SPLIT, HAS_PAGES,
        )  # fmt: skip


@triton.jit
def _merge_kernel(
    out, lse, partials, stats, cu_seqlens_q, seq_lens, sink_logits,
    num_q_heads, max_chosen, num_spans, short_rows, SPEC: tl.constexpr, HAS_PAGES: tl.constexpr,
):  # fmt: skip
    """Grid [requests, query heads]: a row's spans from the scratch, in ascending order, to out and lse."""
    request, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_seqlens_q + request)
    num_queries = tl.load(cu_seqlens_q + request + 1) - begin
    history = tl.load(seq_lens + request) - num_queries
    num_queries = tl.where(num_queries * SPEC.group > short_rows, 0, num_queries)
    one = tl.arange(0, 1)
    dim = tl.arange(0, SPEC.width)
    for query in range(num_queries):
        place = (begin + query).to(tl.int64) * num_q_heads + head + one
        first, end = seen_range(history + query, history + query, SPEC)
        if HAS_PAGES:
            first, end = 0 * first, max_chosen
        sink_spans, first_span, last_span = span_range(first, end, SPEC)
        acc = tl.zeros([1, SPEC.width], tl.float32)
        top = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        # Unrolled, so that several spans are under way while one is added.
        for index in tl.range(0, sink_spans + last_span - first_span, loop_unroll_factor=4):
            span = tl.where(index < sink_spans, index, index - sink_spans + first_span)
            source = place * num_spans + span
            span_total = tl.load(stats + 2 * source + 1)
            is_used = (span_total != 0.0)[:, None] & (dim < SPEC.head_dim)[None, :]
            span_acc = tl.load(partials + source[:, None] * SPEC.width + dim[None, :], mask=is_used, other=0.0)
            acc, top, total = merge(acc, top, total, span_acc, tl.load(stats + 2 * source), span_total)
        sink = total
        if SPEC.has_sink_logits:
            sink = tl.load(sink_logits + head + one)
        result, row_lse = finish(acc, top, total, sink, SPEC)
        store_rows(out, lse, place, result, row_lse, one == 0, SPEC)


def run(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    kv_format: KVFormat,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    options: AttentionOptions = PLAIN,
    pages: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if INTERPRETED:  # on a GPU it would wait for the device, each layer: there the engine's own checks must do
        fault = find_fault(len(q), len(kv_cache), kv_format, cu_seqlens_q, seq_lens, block_tables, options, pages)
        if fault:
            raise ValueError(FAULTS[fault])
    num_tokens, num_q_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_tokens, num_q_heads, dtype=torch.float32, device=q.device)
    if num_tokens:
        _launch(q, out, lse, kv_cache, kv_format, cu_seqlens_q, seq_lens, block_tables, scale, options, pages)
    return (out, lse) if return_lse else out


def _launch(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    kv_cache: torch.Tensor,
    kv_format: KVFormat,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    options: AttentionOptions,
    pages: torch.Tensor | None,
) -> None:
    """Grids come from shapes alone: the lengths are on the device. Programs that find nothing to do end at once."""
    num_tokens, num_q_heads, _ = q.shape
    num_reqs, kv_heads = len(seq_lens), kv_format.num_kv_heads
    if block_tables.stride(-1) != 1:
        block_tables = block_tables.contiguous()
    tiles = tiles_for("interpreter" if INTERPRETED else architecture(q.device), kv_format, q.dtype)
    spec = make_spec(kv_format, num_q_heads // kv_heads, q.dtype, tiles.keys, options)
    num_columns = block_tables.shape[1] if pages is None else pages.shape[2]
    num_spans = triton.cdiv(max(1, num_columns * kv_format.block_size), SPAN)
    # A single request's number of queries is known; of several, one may have any. With as many tokens as requests
    # they are decodes but for odd steps, and the decode kernel takes whatever is there.
    takes_all = num_tokens <= num_reqs or (num_reqs == 1 and num_tokens * spec.group <= tiles.decode_rows)
    short_rows = _ALL_ROWS if takes_all else tiles.decode_rows
    scratch = num_tokens * num_q_heads * num_spans
    split = num_spans > 1 and 4 * scratch * (spec.width + 2) <= _MAX_SCRATCH
    if num_reqs == 1 and not takes_all:
        split, scratch = False, 0
    partials = torch.empty(scratch * spec.width if split else 0, dtype=torch.float32, device=q.device)
    stats = torch.empty(scratch * 2 if split else 0, dtype=torch.float32, device=q.device)
    common = (
        q, out, lse, partials, stats, *_views(kv_cache, kv_format), cu_seqlens_q, seq_lens, block_tables, pages,
        options.alibi_slopes, options.sink_logits, q.stride(0), q.stride(1), block_tables.stride(0), num_q_heads,
        num_columns * kv_format.block_size, num_spans, scale,
    )  # fmt: skip
    if not takes_all:
        rows = tiles.prefill_rows
        _prefill_kernel[(num_tokens * spec.group // rows + num_reqs, kv_heads)](
            *common, num_reqs, short_rows, spec, rows, False, False,
            **_options(tiles.prefill_warps, tiles.prefill_stages),
        )  # fmt: skip
        if num_reqs == 1:
            return
    _decode_kernel[(num_reqs, kv_heads, num_spans if split else 1)](
        *common, short_rows, spec, tiles.decode_rows, split, pages is not None,
        **_options(tiles.decode_warps, tiles.decode_stages),
    )  # fmt: skip
    if split:
        _merge_kernel[(num_reqs, num_q_heads)](
            out, lse, partials, stats, cu_seqlens_q, seq_lens, options.sink_logits, num_q_heads,
            num_columns * kv_format.block_size, num_spans, short_rows, spec, pages is not None,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def _views(kv_cache: torch.Tensor, kv_format: KVFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cache as codes of keys, codes of values, and parameters."""
    keys, values = (
        kv_cache.view(torch.int8 if side.code.name == "int8" else side.code.dtype)
        for side in (kv_format.k, kv_format.v)
    )
    return keys, values, kv_cache.view(torch.float16)


def _options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Without fused contraction: see triton_softmax.py."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}


_MODELS = {"starter": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
_CODES = ("bfloat16", "fp8_e4m3", "int8", "int4")


def compile_cases() -> Iterator[CompileCase]:
    """Prefill and split decode of the starter and of Llama-3-8B, each over each kind of cache."""
    for arch in ARCHITECTURES:
        for model, (q_heads, kv_heads, head_dim) in _MODELS.items():
            for code in _CODES:
                kv_format = KVFormat(code, code, kv_heads, head_dim, 16)
                tiles = tiles_for(arch, kv_format, torch.bfloat16)
                spec = make_spec(kv_format, q_heads // kv_heads, torch.bfloat16, tiles.keys, PLAIN)
                yield _case(f"{model} {code} prefill", arch, kv_format, spec, _prefill_kernel, False, tiles)
                yield _case(f"{model} {code} decode", arch, kv_format, spec, _decode_kernel, True, tiles)
                if code in ("bfloat16", "int4"):  # the merge knows of the cache only whether values are rotated
                    yield _case(f"{model} {code} merge", arch, kv_format, spec, _merge_kernel, True, tiles)


def _case(name: str, arch: str, kv_format: KVFormat, spec: Spec, kernel: Any, split: bool, tiles: Tiles) -> CompileCase:
    keys, values = (
        POINTERS[torch.int8 if side.code.name == "int8" else side.code.dtype] for side in (kv_format.k, kv_format.v)
    )
    is_prefill, is_merge = kernel is _prefill_kernel, kernel is _merge_kernel
    types = {"q": "*bf16", "out": "*bf16", "keys": keys, "values": values, "params": "*fp16", "scale": "fp32"}
    types |= dict.fromkeys(("lse", "partials", "stats"), "*fp32")
    types |= dict.fromkeys(("cu_seqlens_q", "seq_lens", "block_tables"), "*i32")
    constants = {
        "pages": None,
        "alibi_slopes": None,
        "sink_logits": None,
        "SPEC": spec,
        "ROWS": tiles.prefill_rows if is_prefill else tiles.decode_rows,
        "SPLIT": split,
        "HAS_PAGES": False,
    }
    arguments = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in arguments if name not in constants}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constants={name: value for name, value in constants.items() if name in arguments},
        aligned=(*(name for name, kind in signature.items() if kind.startswith("*")), "q_token", "q_head"),
        num_warps=1 if is_merge else tiles.prefill_warps if is_prefill else tiles.decode_warps,
        num_stages=tiles.prefill_stages if is_prefill else tiles.decode_stages,
        uses_dot=not is_merge,
        extra_options={"enable_fp_fusion": False},
        large=("keys", "values", "params"),
        architectures=(arch,),
    )
