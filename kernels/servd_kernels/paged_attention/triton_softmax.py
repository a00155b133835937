"""Owns the Triton device functions of the online softmax: scores, a tile's step, the merge of spans, the finish.
Does not know pages, block tables or the launch grid. Kernels that use it are compiled without fused contraction
(enable_fp_fusion): a masked and an unmasked tile, or two kernels, must round alike."""

import triton
import triton.language as tl

from servd_kernels.paged_attention.triton_load import find_spoiled, load_side, locate
from servd_kernels.triton_support import dot, narrow

LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def step(
    q, rows, cache, kv_head, begin, reach, acc, top, total,
    SPEC: tl.constexpr, HAS_PAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds keys begin.. begin + KEYS to a state. q [ROWS, WIDTH]; rows: position, score scale and ALiBi slope of each
    row; reach: some row sees keys first to end, or sink tokens, and positions go from low to high. State: acc
    [ROWS, WIDTH], relative to 2^top [ROWS]; total [ROWS], the sum of weights. Unmasked: every row sees all keys."""
    keys, values, params, table, pages = cache
    position, score_scale, slope = rows
    first, end, low, high = reach
    index = begin + tl.arange(0, SPEC.keys)
    is_wanted = index < end
    if SPEC.window > 0 and not HAS_PAGES:
        is_wanted = is_wanted & ((index >= first) | (index < SPEC.sinks))
    key_position, block, place, is_wanted = locate(table, pages, index, is_wanted, SPEC, HAS_PAGES, MASKED)
    if HAS_PAGES:
        is_wanted = is_wanted & _sees(tl.max(position, 0), key_position, SPEC)  # all rows are of one query
    if MASKED and not HAS_PAGES:
        # Zero times what only other rows see would be NaN if that is: such values go, and their keys become NaN.
        is_spoiled = tl.zeros([SPEC.keys], tl.int32)
        if low < high:  # the rows of one query see the same keys, and no others are loaded
            is_spoiled = find_spoiled(values, params, block, place, kv_head, is_wanted, SPEC, SPEC.v)
    k, key_factor = load_side(keys, params, block, place, kv_head, is_wanted, SPEC, SPEC.k, MASKED)
    scores = _scores(q, k, key_factor, score_scale, slope, position, key_position, SPEC)
    if MASKED:
        is_seen = _sees(position[:, None], key_position[None, :], SPEC) & is_wanted[None, :]
        if not HAS_PAGES:
            scores = tl.where((is_spoiled != 0)[None, :], float("nan"), scores)
            is_wanted = is_wanted & (is_spoiled == 0)
        scores = tl.where(is_seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    keep = tl.exp2(top - base)
    v, value_factor = load_side(values, params, block, place, kv_head, is_wanted, SPEC, SPEC.v, MASKED)
    total = total * keep + tl.sum(weights, 1)
    if SPEC.v.is_scaled:
        weights = weights * value_factor[None, :]
    acc = dot(narrow(weights, SPEC.v.operand), v, acc * keep[:, None])
    return acc, new_top, total


@triton.jit
def _sees(position, key_position, SPEC: tl.constexpr):
    is_seen = key_position <= position
    if SPEC.window > 0:
        is_seen = is_seen & ((key_position > position - SPEC.window) | (key_position < SPEC.sinks))
    return is_seen


@triton.jit
def _scores(q, k, key_factor, score_scale, slope, position, key_position, SPEC: tl.constexpr):
    """[ROWS, KEYS] to the base 2. score_scale holds log2(e) already where nothing comes between."""
    scores = dot(q.to(k.dtype), tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    if SPEC.k.is_scaled:
        scores = scores * key_factor[None, :]
    scores = scores * score_scale[:, None]
    if SPEC.has_alibi:
        distance = (key_position[None, :] - position[:, None]).to(tl.float32)
        scores = scores + slope[:, None] * distance
    if SPEC.softcap > 0:
        scores = SPEC.softcap * _tanh(scores / SPEC.softcap)
    if SPEC.has_bias:
        scores = scores * LOG2_E
    return scores


@triton.jit
def _tanh(x):
    """To float32's precision also for small x, where 1 - exp(-2x) would cancel: a Pade approximant there."""
    size = tl.minimum(tl.abs(x), 20.0)
    square = size * size
    numerator = size * (135135.0 + square * (17325.0 + square * (378.0 + square)))
    small = numerator / (135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0)))
    rest = tl.exp2(size * (-2.0 * LOG2_E))
    large = (1.0 - rest) / (1.0 + rest)
    result = tl.where(size < 1.0, small, large)
    result = tl.where(x < 0.0, -result, result)
    return tl.where(x == x, result, x)


@triton.jit
def merge(acc, top, total, span_acc, span_top, span_total):
    """The state of keys, and of later ones, as one. [ROWS, WIDTH] and [ROWS]."""
    new_top = tl.maximum(top, span_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep = tl.exp2(top - base)
    add = tl.exp2(span_top - base)
    return acc * keep[:, None] + span_acc * add[:, None], new_top, total * keep + span_total * add


@triton.jit
def finish(acc, top, total, sink, SPEC: tl.constexpr):
    """The rows' results, [ROWS, WIDTH], and their log-sum-exp [ROWS]. sink [ROWS]: the logit that has no value."""
    if SPEC.has_sink_logits:
        acc, top, total = merge(acc, top, total, tl.zeros_like(acc), sink * LOG2_E, tl.full(top.shape, 1.0, tl.float32))
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPEC.turned > 1:
        result = _turn_back(result, SPEC.turned)
    # The logarithm of no weight at all is -inf, as is its top.
    lse = (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * _LN_2
    return result, lse


@triton.jit
def _turn_back(x, BLOCK: tl.constexpr):
    """The Walsh-Hadamard transform (kv_format.hadamard) of rows [ROWS, WIDTH], BLOCK dimensions at a time."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    for level in tl.static_range(0, BLOCK.bit_length() - 1):
        pairs = tl.reshape(x, [ROWS, WIDTH // (2 << level), 2, 1 << level])
        first, second = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
        pairs = tl.permute(tl.join(first + second, first - second), [0, 1, 3, 2])
        x = tl.reshape(pairs, [ROWS, WIDTH])
    return x * (BLOCK**-0.5)
