"""Owns the Triton sampler: a scan in tiles over all rows, then one program a row that chooses, and one that reports.
Does not know the searches within a row (triton_search.py)."""

from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl

from servd_kernels.sample.params import HEADER, SampleParams, width
from servd_kernels.sample.triton_search import (
    BLOCK,
    FEW,
    TILE,
    collect,
    draw,
    first_above,
    keep_best,
    key_of,
    lowest_of_best,
    total_of,
    uniform,
)
from servd_kernels.triton_support import CompileCase, unsupported

_IN_PROMPT = tl.constexpr(1 << 30)  # the bit of a count that says: seen, perhaps in the prompt alone
_CHUNK = tl.constexpr(1024)  # tokens of a list added together
_NUM_WARPS = 8
MAX_VOCAB = 1 << 20  # maxima of blocks must fit the registers of one program


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return unsupported(device, dtype, (torch.float32,))


@triton.jit
def _edit_kernel(
    work, counts, faults, vocab, bias_offsets, bias_ids, bias_values, history_offsets, history_ids, num_prompt_tokens,
    HAS_BIAS: tl.constexpr, HAS_HISTORY: tl.constexpr,
):  # fmt: skip
    """Adds one row's biases to `work` and counts its history; atomics, whose order changes no sum here."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, _CHUNK)
    num_bad = tl.full((), 0, tl.int32)
    if HAS_BIAS:
        end = tl.load(bias_offsets + row + 1)
        for begin in range(tl.load(bias_offsets + row), end, _CHUNK):
            inside = begin + lane < end
            token = tl.load(bias_ids + begin + lane, mask=inside, other=0)
            good = (token >= 0) & (token < vocab)
            value = tl.load(bias_values + begin + lane, mask=inside, other=0.0)
            tl.atomic_add(work + row * vocab + token, value, mask=inside & good)
            num_bad += tl.sum((inside & ~good).to(tl.int32))
    if HAS_HISTORY:
        first, end = tl.load(history_offsets + row), tl.load(history_offsets + row + 1)
        first_output = first + tl.load(num_prompt_tokens + row)
        for begin in range(first, end, _CHUNK):
            inside = begin + lane < end
            token = tl.load(history_ids + begin + lane, mask=inside, other=0)
            good = (token >= 0) & (token < vocab)
            place = counts + row * vocab + token
            tl.atomic_or(place, tl.full((_CHUNK,), _IN_PROMPT, tl.int32), mask=inside & good)
            one = tl.full((_CHUNK,), 1, tl.int32)
            tl.atomic_add(place, one, mask=inside & good & (begin + lane >= first_output))
            num_bad += tl.sum((inside & ~good).to(tl.int32))
    tl.store(faults + row, num_bad)


@triton.jit
def _describe(x, temperature, tile_max, tile_sum, block_max, NUM_BLOCKS: tl.constexpr):
    """Stores a tile's maximum (NaN if there is one), its sum of weights relative to that, and its blocks' maxima."""
    blocks = tl.max(tl.reshape(tl.where(x != x, float("-inf"), x), (NUM_BLOCKS, BLOCK)), axis=1)
    tl.store(block_max + tl.arange(0, NUM_BLOCKS), blocks)
    highest = tl.max(blocks)
    num_nan = tl.sum((x != x).to(tl.int32))
    tl.store(tile_max, tl.where(num_nan > 0, float("nan"), highest))
    finite = tl.where(tl.abs(highest) < float("inf"), highest, 0.0)  # else there is nothing to weigh, or the row fails
    inverse = 1.0 / tl.where(temperature > 0, temperature, 1.0)
    tl.store(tile_sum, tl.sum(tl.exp(tl.minimum(x - finite, 0.0) * inverse)))


@triton.jit
def _scan_kernel(
    logits, row_stride, vocab, work, counts, repetition, presence, frequency, allowed, temperature,
    tile_max, tile_sum, block_max, raw_max, raw_sum, raw_block_max,
    IS_EDITED: tl.constexpr, HAS_HISTORY: tl.constexpr, HAS_ALLOWED: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Describes one tile of a row, raw and, if it differs, after the edits, which it finishes in `work`."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * tl.num_programs(1) + tile
    column = tile * TILE + tl.arange(0, TILE)
    mask = column < vocab
    x = tl.load(logits + row * row_stride + column, mask=mask, other=float("-inf"))
    row_temperature = tl.load(temperature + row).to(tl.float32)
    if not IS_EDITED:
        _describe(x, row_temperature, tile_max + at, tile_sum + at, block_max + at * NUM_BLOCKS, NUM_BLOCKS)
    _describe(x, 1.0, raw_max + at, raw_sum + at, raw_block_max + at * NUM_BLOCKS, NUM_BLOCKS)
    if IS_EDITED:
        x = tl.load(work + row * vocab + column, mask=mask, other=float("-inf"))
        if HAS_ALLOWED:
            words = (vocab + 31) // 32
            word = tl.load(allowed + row * words + column // 32, mask=mask, other=0)
            x = tl.where((word >> (column % 32)) & 1 != 0, x, float("-inf"))
        if HAS_HISTORY:
            seen = tl.load(counts + row * vocab + column, mask=mask, other=0)
            count = seen & (_IN_PROMPT - 1)
            factor = tl.load(repetition + row)
            penalized = tl.where(x > 0, tl.div_rn(x, tl.full((TILE,), 0.0, tl.float32) + factor), x * factor)
            penalized -= count.to(tl.float32) * tl.load(frequency + row)
            penalized -= tl.where(count > 0, tl.load(presence + row), 0.0)
            x = tl.where(seen != 0, penalized, x)
        tl.store(work + row * vocab + column, x, mask=mask)
        _describe(x, row_temperature, tile_max + at, tile_sum + at, block_max + at * NUM_BLOCKS, NUM_BLOCKS)


@triton.jit
def _row_maximum(tile_max, num_tiles, TILES: tl.constexpr):
    """(highest, failure code) of a row."""
    tile = tl.arange(0, TILES)
    maxima = tl.load(tile_max + tile, mask=tile < num_tiles, other=float("-inf"))
    num_nan = tl.sum((maxima != maxima).to(tl.int32))
    highest = tl.max(tl.where(maxima != maxima, float("-inf"), maxima))
    failure = tl.where(highest == float("inf"), 2, tl.where(highest == float("-inf"), 3, 0))
    return highest, tl.where(num_nan > 0, 1, failure)


@triton.jit
def _running_sums(tile_max, tile_sum, num_tiles, highest, inverse_temperature, TILES: tl.constexpr):
    """[TILES] sums of weights relative to `highest`, up to each tile and with it."""
    tile = tl.arange(0, TILES)
    maxima = tl.load(tile_max + tile, mask=tile < num_tiles, other=float("-inf"))
    sums = tl.load(tile_sum + tile, mask=tile < num_tiles, other=0.0)
    return tl.cumsum(sums * tl.exp((maxima - highest) * inverse_temperature), 0)


@triton.jit
def _draw_from_all(x, vocab, tile_max, tile_sum, num_tiles, highest, inverse, seed, position, TILES: tl.constexpr):
    """No filter: the sums by tile are known, and one tile is looked at."""
    tile = tl.arange(0, TILES)
    sums = _running_sums(tile_max, tile_sum, num_tiles, highest, inverse, TILES).to(tl.float64)
    total = tl.max(sums)
    target = tl.minimum(uniform(seed, position) * total, total * (1.0 - 2.220446049250313e-16))
    chosen = tl.min(tl.where(sums > target, tile, TILES))
    running = tl.max(tl.where(tile < chosen, sums, 0.0))
    column = chosen * TILE + tl.arange(0, TILE)
    value = tl.load(x + column, mask=column < vocab, other=float("-inf"))
    return first_above(tl.exp((value - highest) * inverse), column, running, target)


@triton.jit
def _draw_filtered(
    x, vocab, tile_max, tile_sum, num_tiles, block_max, values, ids, highest, temperature, top_k, top_p, min_p,
    seed, position, TILES: tl.constexpr, BLOCKS: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Collects the few tokens that the filters could leave, then filters these."""
    inverse = 1.0 / temperature
    has_top_k = (top_k > 0) & (top_k < vocab)
    total = tl.max(_running_sums(tile_max, tile_sum, num_tiles, highest, inverse, TILES))
    if has_top_k:
        lowest = lowest_of_best(block_max, num_tiles * NUM_BLOCKS, top_k, BLOCKS)
    else:
        # Tokens so far below the highest hold, all together, less than what top-p lets go; or min-p takes each.
        lightest = tl.where(top_p < 1.0, (1.0 - top_p).to(tl.float32) * total / vocab, min_p)
        lowest = highest + (tl.log(lightest) * 1.0001 - 0.001) * temperature - 1e-6 * tl.abs(highest)
    count = collect(x, vocab, lowest, block_max, values, ids)
    wanted = top_k.to(tl.float32)
    for weighs in range(2):  # top-k counts tokens, top-p weighs what that left
        if weighs == 1:
            total = tl.where(has_top_k, total_of(values, count, highest, inverse), total)
            wanted = top_p.to(tl.float32) * total
        if tl.where(weighs == 1, top_p < 1.0, has_top_k):
            keep_best(values, count, wanted, highest, inverse, weighs == 1)
    return tl.load(ids + draw(values, count, highest, inverse, min_p, uniform(seed, position)))


@triton.jit
def _argmax(x, vocab, tile_max, num_tiles, highest, TILES: tl.constexpr):
    tile = tl.arange(0, TILES)
    maxima = tl.load(tile_max + tile, mask=tile < num_tiles, other=float("-inf"))
    column = tl.min(tl.where(maxima == highest, tile, TILES)) * TILE + tl.arange(0, TILE)
    value = tl.load(x + column, mask=column < vocab, other=float("-inf"))
    return tl.min(tl.where((value == highest) & (column < vocab), column, 0x7FFFFFFF))


@triton.jit
def _choose_kernel(
    x, row_stride, vocab, packed, width, temperature, top_p, min_p, top_k, seeds, positions, given, faults,
    raw_max, tile_max, tile_sum, block_max, values, ids, num_tiles,
    HAS_GIVEN: tl.constexpr, HAS_FAULTS: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row's token and failure code; all else of the answer is set to nothing."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    nothing = tl.where((column >= 4) & (column < (width + 4) // 2), -1, 0)
    tl.store(packed + row * width + column, nothing, mask=(column >= 2) & (column < width))
    _, failure = _row_maximum(raw_max + row * num_tiles, num_tiles, TILES)
    token = tl.full((), 0, tl.int32)
    if HAS_GIVEN:
        token = tl.load(given + row)
        failure = tl.where((failure == 0) & ((token < 0) | (token >= vocab)), 4, failure)
    else:
        maxima, sums = tile_max + row * num_tiles, tile_sum + row * num_tiles
        highest, later_failure = _row_maximum(maxima, num_tiles, TILES)
        if HAS_FAULTS:
            later_failure = tl.where(tl.load(faults + row) > 0, 4, later_failure)
        failure = tl.where(failure != 0, failure, later_failure)
        if failure == 0:
            t, p, k = tl.load(temperature + row).to(tl.float32), tl.load(top_p + row), tl.load(top_k + row)
            least = tl.load(min_p + row).to(tl.float32)
            seed, position = tl.load(seeds + row), tl.load(positions + row)
            if t == 0.0:
                token = _argmax(x + row * row_stride, vocab, maxima, num_tiles, highest, TILES)
            elif ((k <= 0) | (k >= vocab)) & (p >= 1.0) & (least == 0.0):
                token = _draw_from_all(
                    x + row * row_stride, vocab, maxima, sums, num_tiles, highest, 1.0 / t, seed, position, TILES
                )
            else:
                token = _draw_filtered(
                    x + row * row_stride, vocab, maxima, sums, num_tiles, block_max + row * num_tiles * NUM_BLOCKS,
                    values + row * vocab, ids + row * vocab, highest, t, k, p, least, seed, position,
                    TILES, BLOCKS, NUM_BLOCKS,
                )  # fmt: skip
    tl.store(packed + row * width, tl.where(failure == 0, token, 0))
    tl.store(packed + row * width + 1, failure)


@triton.jit
def _report_kernel(
    logits, row_stride, vocab, packed, width, num_logprobs, raw_max, raw_sum, raw_block_max, values, ids, num_tiles,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Rank, logprob and the best alternatives of one row that has its token."""
    row = tl.program_id(0).to(tl.int64)
    x, answer = logits + row * row_stride, packed + row * width
    num_top = tl.load(num_logprobs + row).to(tl.int32)
    if (tl.load(answer + 1) == 0) & (num_top >= 0):
        maxima = raw_max + row * num_tiles
        highest, _ = _row_maximum(maxima, num_tiles, TILES)
        sums = _running_sums(maxima, raw_sum + row * num_tiles, num_tiles, highest, 1.0, TILES)
        log_total = tl.log(tl.max(sums))
        chosen = tl.load(x + tl.load(answer))
        rank = tl.full((), 1, tl.int32)
        for tile in range(num_tiles):
            if tl.load(maxima + tile) > chosen:
                column = tile * TILE + tl.arange(0, TILE)
                value = tl.load(x + column, mask=column < vocab, other=float("-inf"))
                rank += tl.sum((value > chosen).to(tl.int32))
        tl.store(answer + 2, rank)
        tl.store(answer + 3, ((chosen - highest) - log_total).to(tl.int32, bitcast=True))
        num_top = tl.minimum(tl.minimum(num_top, vocab), (width - 4) // 2)
        if num_top > 0:
            blocks = raw_block_max + row * num_tiles * NUM_BLOCKS
            lowest = lowest_of_best(blocks, num_tiles * NUM_BLOCKS, num_top, BLOCKS)
            count = collect(x, vocab, lowest, blocks, values + row * vocab, ids + row * vocab)
            previous = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
            for place in range(num_top):
                previous = _next_best(values + row * vocab, ids + row * vocab, count, previous)
                token = (0x7FFFFFFF - (previous & 0x7FFFFFFF)).to(tl.int32)
                logprob = (tl.load(x + token) - highest) - log_total
                tl.store(answer + 4 + place, token)
                tl.store(answer + (width + 4) // 2 + place, logprob.to(tl.int32, bitcast=True))


@triton.jit
def _next_best(values, ids, count, previous):
    """The highest (key, falling id) below `previous`, as one number."""
    best = tl.full((), -1, tl.int64)
    for begin in range(0, count, FEW):
        column = begin + tl.arange(0, FEW)
        value = tl.load(values + column, mask=column < count, other=float("-inf"))
        token = tl.load(ids + column, mask=column < count, other=0)
        both = (key_of(value).to(tl.int64) << 31) | (0x7FFFFFFF - token).to(tl.int64)
        best = tl.maximum(best, tl.max(tl.where((column < count) & (both < previous), both, -1)))
    return best


def run(logits: torch.Tensor, params: SampleParams) -> torch.Tensor:
    rows, vocab = logits.shape
    packed = torch.empty(rows, width(params), dtype=torch.int32, device=logits.device)
    if not rows:
        return packed
    num_tiles, num_blocks = triton.cdiv(vocab, TILE.value), TILE.value // BLOCK.value
    tiles, blocks = triton.next_power_of_2(num_tiles), triton.next_power_of_2(num_tiles * num_blocks)
    sizes = {"TILES": tiles, "BLOCKS": blocks, "NUM_BLOCKS": num_blocks, "num_warps": _NUM_WARPS}

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    tile_max, tile_sum, raw_max, raw_sum = floats(4, rows, num_tiles)
    block_max, raw_block_max = floats(2, rows, num_tiles * num_blocks)
    values, ids = floats(rows, vocab), torch.empty(rows, vocab, dtype=torch.int32, device=logits.device)
    is_edited = params.given is None and (
        params.bias is not None or params.history is not None or params.allowed is not None
    )
    work, counts, faults = _edit(logits, params) if is_edited else (logits, packed, packed)
    history = params.history
    _scan_kernel[(rows, num_tiles)](
        logits, logits.stride(0), vocab, work, counts,
        *((history.repetition, history.presence, history.frequency) if history else (raw_max,) * 3),
        packed if params.allowed is None else params.allowed, params.temperature,
        tile_max, tile_sum, block_max, raw_max, raw_sum, raw_block_max,
        IS_EDITED=is_edited, HAS_HISTORY=history is not None, HAS_ALLOWED=params.allowed is not None,
        NUM_BLOCKS=num_blocks, num_warps=_NUM_WARPS,
    )  # fmt: skip
    _choose_kernel[(rows,)](
        work, work.stride(0), vocab, packed, packed.shape[1], params.temperature, params.top_p, params.min_p,
        params.top_k, params.seeds, params.positions, packed if params.given is None else params.given, faults,
        raw_max, tile_max, tile_sum, block_max, values, ids, num_tiles,
        HAS_GIVEN=params.given is not None, HAS_FAULTS=is_edited, WIDTH=triton.next_power_of_2(packed.shape[1]),
        **sizes,
    )  # fmt: skip
    if params.max_logprobs >= 0:
        _report_kernel[(rows,)](
            logits, logits.stride(0), vocab, packed, packed.shape[1], params.num_logprobs,
            raw_max, raw_sum, raw_block_max, values, ids, num_tiles, **sizes,
        )  # fmt: skip
    return packed


def _edit(logits: torch.Tensor, params: SampleParams) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits with their biases, the counts of the history, and how many bad token ids each row has."""
    rows, vocab = logits.shape
    work = logits.clone(memory_format=torch.contiguous_format)
    faults = torch.empty(rows, dtype=torch.int32, device=logits.device)
    bias, history = params.bias, params.history
    counts = torch.zeros(rows if history else 0, vocab, dtype=torch.int32, device=logits.device)
    _edit_kernel[(rows,)](
        work, counts, faults, vocab,
        *((bias.offsets, bias.token_ids, bias.values) if bias else (faults, faults, work)),
        *((history.offsets, history.token_ids, history.num_prompt_tokens) if history else (faults,) * 3),
        HAS_BIAS=bias is not None, HAS_HISTORY=history is not None, num_warps=4,
    )  # fmt: skip
    return work, counts, faults


_SIGNATURE = {
    name: kind
    for kind, names in {
        "*fp32": "logits x work bias_values repetition presence frequency tile_max tile_sum block_max raw_max raw_sum "
        "raw_block_max values",
        "*fp64": "temperature top_p min_p",
        "*i64": "top_k seeds positions num_logprobs",
        "*i32": "counts faults bias_offsets bias_ids history_offsets history_ids num_prompt_tokens allowed given "
        "packed ids",
        "i32": "row_stride vocab width num_tiles",
    }.items()
    for name in names.split()
}


def compile_cases() -> Iterator[CompileCase]:
    """The vocabularies of the starter model and of Llama-3, and all that rows can ask for."""
    edits = {"HAS_BIAS": True, "HAS_HISTORY": True}
    yield _compile_case("bias and history", _edit_kernel, edits, num_warps=4)
    for vocab in (49_152, 128_256):
        num_tiles, num_blocks = triton.cdiv(vocab, TILE.value), TILE.value // BLOCK.value
        sizes: dict[str, int] = {
            "TILES": triton.next_power_of_2(num_tiles),
            "BLOCKS": triton.next_power_of_2(num_tiles * num_blocks),
            "NUM_BLOCKS": num_blocks,
        }
        for is_edited in (False, True):
            flags = dict.fromkeys(("IS_EDITED", "HAS_HISTORY", "HAS_ALLOWED"), is_edited)
            name = f"scan {vocab}{' + edits' if is_edited else ''}"
            yield _compile_case(name, _scan_kernel, {**flags, "NUM_BLOCKS": num_blocks})
        for is_given in (False, True):
            flags = {"HAS_GIVEN": is_given, "HAS_FAULTS": not is_given}
            name = f"choose {vocab}{', given' if is_given else ''}"
            yield _compile_case(name, _choose_kernel, {**sizes, **flags, "WIDTH": HEADER})
        yield _compile_case(f"report {vocab}", _report_kernel, sizes)


def _compile_case(
    name: str, kernel: triton.JITFunction, constants: Mapping[str, int], num_warps: int = _NUM_WARPS
) -> CompileCase:
    signature = {argument: _SIGNATURE[argument] for argument in kernel.arg_names if argument not in constants}
    return CompileCase(name, kernel, signature, constants, num_warps=num_warps)
