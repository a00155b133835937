"""Owns the Triton device function that attends one tile of query rows: its rows, the spans and tiles of keys it runs.
Does not know which tile a program has (triton.py) or what a tile of keys does to a row (triton_softmax.py)."""

import triton
import triton.language as tl

from servd_kernels.paged_attention.triton_softmax import LOG2_E, finish, merge, step
from servd_kernels.paged_attention.triton_spec import SPAN
from servd_kernels.triton_support import narrow

_SPAN = tl.constexpr(SPAN)


@triton.jit
def attend_tile(
    tensors, options, strides, request, kv_head, tile, span, scale,
    SPEC: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, HAS_PAGES: tl.constexpr,
):  # fmt: skip
    """Rows tile * ROWS.. of a request (row = query * group + head of the group) for one kv head: all their spans,
    to out and lse; or, if SPLIT, `span` alone, to the scratch."""
    q, out, lse, partials, stats, keys, values, params, cu_seqlens_q, seq_lens, block_tables, pages = tensors
    alibi_slopes, sink_logits = options
    q_token, q_head, table_stride, num_q_heads, max_chosen, num_spans = strides
    num_rows = (tl.load(cu_seqlens_q + request + 1) - tl.load(cu_seqlens_q + request)) * SPEC.group
    low = tl.load(seq_lens + request) - num_rows // SPEC.group + tile * ROWS // SPEC.group
    high = low + (tl.minimum(tile * ROWS + ROWS, num_rows) - 1) // SPEC.group - tile * ROWS // SPEC.group
    first_token, query, head, is_row = locate_rows(cu_seqlens_q, request, tile, SPEC, ROWS)
    position = tl.minimum(low + query, high)
    dim = tl.arange(0, SPEC.width)
    q_base = q + first_token * q_token + (kv_head * SPEC.group).to(tl.int64) * q_head
    tile_q = tl.load(
        q_base + (query * q_token + head * q_head)[:, None] + dim[None, :],
        mask=is_row[:, None] & (dim < SPEC.head_dim)[None, :],
        other=0.0,
    )
    score_scale = row_scales(position, scale, SPEC)
    slope = score_scale
    if SPEC.has_alibi:
        slope = tl.load(alibi_slopes + kv_head * SPEC.group + head, mask=is_row, other=0.0)
    rows = (position, score_scale, slope)
    if HAS_PAGES:
        pages += (request.to(tl.int64) * (num_q_heads // SPEC.group) + kv_head) * (max_chosen // SPEC.block_size)
        first, end = 0, max_chosen
    else:
        first, end = seen_range(low, high, SPEC)
    cache = (keys, values, params, block_tables + request.to(tl.int64) * table_stride, pages)
    reach = (first, end, low, high)
    if SPLIT:
        if span * _SPAN < end:
            acc, top, total = _attend_span(tile_q, rows, cache, kv_head, span, reach, SPEC, ROWS, HAS_PAGES)
            first_token, query, head, is_row = locate_rows(cu_seqlens_q, request, tile, SPEC, ROWS)
            first_place = first_token * num_q_heads + kv_head * SPEC.group
            first_state = first_place * num_spans + span
            place = (query * num_q_heads + head) * num_spans
            store_span(stats + 2 * first_state, partials + first_state * SPEC.width, place, acc, top, total, is_row)
    else:
        acc = tl.zeros([ROWS, SPEC.width], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sink_spans, first_span, last_span = span_range(first, end, SPEC)
        for index in range(sink_spans + last_span - first_span):
            number = tl.where(index < sink_spans, index, index - sink_spans + first_span)
            span_acc, span_top, span_total = _attend_span(
                tile_q, rows, cache, kv_head, number, reach, SPEC, ROWS, HAS_PAGES
            )
            acc, top, total = merge(acc, top, total, span_acc, span_top, span_total)
        first_token, query, head, is_row = locate_rows(cu_seqlens_q, request, tile, SPEC, ROWS)
        first_place = first_token * num_q_heads + kv_head * SPEC.group
        place = query * num_q_heads + head
        sink = slope
        if SPEC.has_sink_logits:
            sink = tl.load(sink_logits + kv_head * SPEC.group + head, mask=is_row, other=0.0)
        result, row_lse = finish(acc, top, total, sink, SPEC)
        store_rows(out + first_place * SPEC.head_dim, lse + first_place, place, result, row_lse, is_row, SPEC)


@triton.jit
def locate_rows(cu_seqlens_q, request, tile, SPEC: tl.constexpr, ROWS: tl.constexpr):
    """The tile's first token (int64), and of each row the query, counted from it, the head in its group, and whether
    the request has it. The loads are volatile so that this is computed twice, before the keys and after them, and does
    not lie in registers meanwhile; a row's own offsets are small, and the large ones scalars, to the same end."""
    begin = tl.load(cu_seqlens_q + request, volatile=True)
    first_row = tile * ROWS + begin * SPEC.group
    end_row = tl.load(cu_seqlens_q + request + 1, volatile=True) * SPEC.group
    row = first_row + tl.arange(0, ROWS)
    first_token = first_row // SPEC.group
    return first_token.to(tl.int64), row // SPEC.group - first_token, row % SPEC.group, row < end_row


@triton.jit
def row_scales(position, scale, SPEC: tl.constexpr):
    """What the products of each row are multiplied by, [ROWS] float32."""
    score_scale = tl.zeros(position.shape, tl.float32) + scale
    if SPEC.log_train_len > 0:
        growth = tl.log((position + 1).to(tl.float32)) / SPEC.log_train_len
        score_scale = score_scale * tl.maximum(growth, 1.0)
    if not SPEC.has_bias:
        score_scale = score_scale * LOG2_E
    return score_scale


@triton.jit
def seen_range(low, high, SPEC: tl.constexpr):
    """The keys that rows at positions low..high see, but for sink tokens."""
    first = low * 0
    if SPEC.window > 0:
        first = tl.maximum(low - SPEC.window + 1, 0)
    return first, high + 1


@triton.jit
def span_range(first, end, SPEC: tl.constexpr):
    """The spans that hold keys first..end: from first_span to last_span, after the `sink_spans` first of all."""
    first_span = first // _SPAN
    sink_spans = first_span * 0
    if SPEC.sinks > 0:
        sink_spans = tl.minimum((SPEC.sinks + _SPAN - 1) // _SPAN, first_span)
    return sink_spans, first_span, (end + _SPAN - 1) // _SPAN


@triton.jit
def _attend_span(q, rows, cache, kv_head, span, reach, SPEC: tl.constexpr, ROWS: tl.constexpr, HAS_PAGES: tl.constexpr):
    """The state of one span of keys, by ascending tiles: those at the window's start, which some rows see in part;
    those that all rows see; those at the rows' own positions."""
    first, end, low, high = reach
    span_begin = span * _SPAN
    span_end = tl.minimum(end, span_begin + _SPAN)
    # Masked tiles are few, but for pages: loads ahead would only cost registers.
    STAGES: tl.constexpr = None if HAS_PAGES else 1
    acc = tl.zeros([ROWS, SPEC.width], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    whole_begin = span_begin
    if HAS_PAGES:
        pages = cache[4]
        if tl.load(pages + span_begin // SPEC.block_size) < 0:
            span_end = span_begin
        whole_end = span_begin
    elif SPEC.window > 0:
        window_begin = tl.minimum(tl.maximum(span_begin, first // SPEC.keys * SPEC.keys), span_end)
        whole_begin = (tl.maximum(high - SPEC.window + 1, 0) + SPEC.keys - 1) // SPEC.keys * SPEC.keys
        whole_begin = tl.minimum(tl.maximum(whole_begin, window_begin), span_end)
        sink_keys = tl.maximum(tl.minimum(SPEC.sinks, window_begin) - span_begin, 0)
        sink_tiles = (sink_keys + SPEC.keys - 1) // SPEC.keys
        edge_tiles = (whole_begin - window_begin + SPEC.keys - 1) // SPEC.keys
        for index in tl.range(0, sink_tiles + edge_tiles, num_stages=1):
            begin = tl.where(index < sink_tiles, span_begin, window_begin - sink_tiles * SPEC.keys) + index * SPEC.keys
            acc, top, total = step(q, rows, cache, kv_head, begin, reach, acc, top, total, SPEC, HAS_PAGES, True)
        # The edge may end with the span's last keys, within a tile.
        whole_begin = window_begin + edge_tiles * SPEC.keys
        whole_end = tl.minimum((low + 1) // SPEC.keys * SPEC.keys, span_end)
    else:
        whole_end = tl.minimum((low + 1) // SPEC.keys * SPEC.keys, span_end)
    if not HAS_PAGES:
        for begin in range(whole_begin, whole_end, SPEC.keys):
            acc, top, total = step(q, rows, cache, kv_head, begin, reach, acc, top, total, SPEC, HAS_PAGES, False)
    for begin in tl.range(tl.maximum(whole_begin, whole_end), span_end, SPEC.keys, num_stages=STAGES):
        acc, top, total = step(q, rows, cache, kv_head, begin, reach, acc, top, total, SPEC, HAS_PAGES, True)
    return acc, top, total


@triton.jit
def store_span(stats, partials, place, acc, top, total, is_row):
    """One span's state of rows at `place` (counted in states) of the scratch; a row that saw no key leaves no sum."""
    tl.store(stats + 2 * place, top, mask=is_row)
    tl.store(stats + 2 * place + 1, total, mask=is_row)
    WIDTH: tl.constexpr = acc.shape[1]
    is_used = is_row & (total != 0.0)
    tl.store(partials + (place * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :], acc, mask=is_used[:, None])


@triton.jit
def store_rows(out, lse, place, result, row_lse, is_row, SPEC: tl.constexpr):
    """Rows at `place` (token * num_q_heads + head) of out and lse."""
    dim = tl.arange(0, SPEC.width)
    mask = is_row[:, None] & (dim < SPEC.head_dim)[None, :]
    tl.store(out + place[:, None] * SPEC.head_dim + dim[None, :], narrow(result, out.dtype.element_ty), mask=mask)
    tl.store(lse + place, row_lse, mask=is_row)
