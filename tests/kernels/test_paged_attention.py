"""Owns the tests of paged_attention.
Knows which layouts of keys each backend reads; does not know how a backend runs (conftest.py)."""

import math
from typing import Any

import pytest
import torch
from servd_kernels import native
from servd_kernels.kv_format import CODES, KVFormat, KVSide, hadamard
from servd_kernels.paged_attention import OP, AttentionOptions, paged_attention, reference
from servd_kernels.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])
SLOPES = torch.tensor([0.5, 0.25, 0.03, 0.0])

# Keys as rows or as words: native kernels read words, Triton rows, the reference both.
LAYOUTS = [
    ("reference", False),
    ("reference", True),
    ("triton", False),
    *((f"cpu-{isa}", True) for isa in native.isas()),
]
on_each_layout = pytest.mark.parametrize(("backend", "key_words"), LAYOUTS, indirect=["backend"])


def slots_of(inputs: dict[str, Any], request: int, positions: torch.Tensor) -> torch.Tensor:
    size = inputs["kv_format"].block_size
    return inputs["block_tables"][request].long()[positions // size] * size + positions % size


def decoded(inputs: dict[str, Any], side: KVSide, slots: torch.Tensor) -> torch.Tensor:
    """Keys or values of a request in float64, [num_q_heads, num_keys, head_dim]; not turned back."""
    kv_format = inputs["kv_format"]
    stored = kv_format.read(inputs["kv_cache"], side, slots).double().transpose(0, 1)
    return stored.repeat_interleave(inputs["q"].shape[1] // kv_format.num_kv_heads, 0)


def expected(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense masked attention and its log-sum-exp in float64, a request at a time, from the decoded cache."""
    q, options, pages = inputs["q"].double(), inputs["options"], inputs.get("pages")
    kv_format = inputs["kv_format"]
    out, lse = torch.zeros_like(q), torch.zeros_like(q[..., 0])
    starts = inputs["cu_seqlens_q"].tolist()
    for request, length in enumerate(inputs["seq_lens"].tolist()):
        rows = slice(starts[request], starts[request + 1])
        position, key = torch.arange(length - rows.stop + rows.start, length)[:, None], torch.arange(length)
        slots = slots_of(inputs, request, key)
        keys, values = (decoded(inputs, side, slots) for side in (kv_format.k, kv_format.v))
        scores = torch.einsum("nhd,htd->hnt", q[rows], keys) * inputs["scale"]
        if options.logn_train_len:
            scores = scores * ((position + 1).double().log() / math.log(options.logn_train_len)).clamp(min=1.0)
        if options.alibi_slopes is not None:
            scores = scores + options.alibi_slopes.double()[:, None, None] * (key - position)
        if options.logit_softcap:
            scores = options.logit_softcap * (scores / options.logit_softcap).tanh()
        hidden = key > position
        if options.sliding_window:
            hidden = hidden | ((key <= position - options.sliding_window) & (key >= options.num_sink_tokens))
        if pages is not None:
            chosen = (pages[request][:, :, None] == key // kv_format.block_size).any(1)  # [num_kv_heads, num_keys]
            chosen = chosen.repeat_interleave(q.shape[1] // kv_format.num_kv_heads, 0)
            hidden, values = hidden | ~chosen[:, None], values.masked_fill(~chosen[..., None], 0.0)
        logits = scores.masked_fill(hidden, -torch.inf)
        if options.sink_logits is not None:
            sink = options.sink_logits.double()[:, None, None].expand(-1, logits.shape[1], 1)
            logits = torch.cat([logits, sink], -1)
        weights = logits.softmax(-1).nan_to_num()[..., :length]  # a row that sees no key is zero
        out[rows] = torch.einsum("hnt,htd->nhd", weights, values)
        lse[rows] = logits.logsumexp(-1).T
    return (turned_back(out) if kv_format.v.code.is_rotated else out), lse


def turned_back(out: torch.Tensor) -> torch.Tensor:
    """`hadamard` in float64."""
    dim = out.shape[-1]
    return out @ hadamard(torch.eye(dim)).sign().double() * (dim & -dim) ** -0.5


def check(inputs: dict[str, Any], backend: str) -> None:
    """The backend's result and log-sum-exp are those of `expected`."""
    expected_out, expected_lse = expected(inputs)
    out, lse = paged_attention(**inputs, return_lse=True, backend=backend)
    assert out.dtype == inputs["q"].dtype and lse.dtype == torch.float32
    assert_close(out, expected_out, "attention")
    # A score of a narrow dtype is a float32 sum of products of rounded numbers: the tolerance is that of q.
    assert_close(lse.to(out.dtype), expected_lse, "attention", scale=4.0)


CASES = {
    "one token": ([1], [1], 1, 1),
    "decode": ([1, 1, 1], [5, 48, 49], 9, 3),
    "prefill": ([53], [53], 6, 2),
    "mixed": ([1, 0, 17, 1, 40], [100, 9, 17, 1, 97], 4, 1),
    "wide group": ([3], [20], 40, 1),
    "several spans": ([2, 5], [1300, 580], 2, 2),
}


@on_each_layout
@pytest.mark.parametrize("window", [0, 1, 47, 48, 49, 64, 5000])  # tiles hold 48 or 64 keys
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(backend: str, key_words: bool, case: str, window: int) -> None:
    options = AttentionOptions(sliding_window=window)
    inputs = reference.make_inputs(*CASES[case], head_dim=24, block_size=7, key_words=key_words, options=options)
    check(inputs, backend)


@on_each_layout
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 128, 256])
def test_head_dims_and_dtypes(backend: str, key_words: bool, head_dim: int, dtype: torch.dtype) -> None:
    check(reference.make_inputs([1, 19], [70, 50], 6, 2, head_dim, dtype=dtype, key_words=key_words), backend)


QUANTIZED = [name for name, code in CODES.items() if code.num_params]


@on_each_layout
@pytest.mark.parametrize("value", ["bfloat16", *QUANTIZED])
@pytest.mark.parametrize("key", ["bfloat16", *QUANTIZED])
def test_each_pair_of_codes(backend: str, key_words: bool, key: str, value: str) -> None:
    check(
        reference.make_inputs([1, 9], [70, 30], 4, 2, 64, 16, torch.bfloat16, key, value, key_words),
        backend,
    )


@on_each_layout
@pytest.mark.parametrize("code", QUANTIZED)
@pytest.mark.parametrize("head_dim", [8, 16, 80, 96, 128, 256])
def test_codes_of_each_head_dim(backend: str, key_words: bool, head_dim: int, code: str) -> None:
    inputs = reference.make_inputs([1, 5], [70, 9], 2, 1, head_dim, 16, torch.bfloat16, code, code, key_words)
    check(inputs, backend)


@on_each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("code", QUANTIZED)
def test_codes_with_other_queries(backend: str, key_words: bool, code: str, dtype: torch.dtype) -> None:
    check(reference.make_inputs([1, 9], [70, 30], 4, 2, 64, 16, dtype, code, code, key_words), backend)


@on_each_layout
@pytest.mark.parametrize("code", ["bfloat16", *QUANTIZED])
@pytest.mark.parametrize("block_size", [1, 8, 23, 32, 64])
def test_block_sizes(backend: str, key_words: bool, block_size: int, code: str) -> None:
    inputs = reference.make_inputs([1, 9], [150, 30], 4, 2, 32, block_size, torch.bfloat16, code, code, key_words)
    check(inputs, backend)


OPTIONS = {
    "logn": AttentionOptions(logn_train_len=20),
    "alibi": AttentionOptions(alibi_slopes=SLOPES),
    "soft-cap": AttentionOptions(logit_softcap=0.75),
    "window": AttentionOptions(sliding_window=30),
    "window and sink tokens": AttentionOptions(sliding_window=30, num_sink_tokens=4),
    "more sink tokens than a tile": AttentionOptions(sliding_window=10, num_sink_tokens=70),
    "sink logits": AttentionOptions(sink_logits=SINKS),
    "all": AttentionOptions(20, SLOPES, 2.0, 60, 10, SINKS),
}


@on_each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", OPTIONS)
def test_options(backend: str, key_words: bool, case: str, dtype: torch.dtype) -> None:
    options = OPTIONS[case]
    lengths = [1, 0, 37, 1, 3], [150, 7, 150, 1, 20]
    check(reference.make_inputs(*lengths, 4, 2, 40, 8, dtype, key_words=key_words, options=options), backend)


@on_each_layout
@pytest.mark.parametrize("code", ["float32", *QUANTIZED])
def test_all_options_over_several_spans(backend: str, key_words: bool, code: str) -> None:
    options = OPTIONS["all"]
    inputs = reference.make_inputs(
        [1, 2], [1100, 1030], 4, 2, 32, 16, torch.float32, code, code, key_words, options=options
    )
    check(inputs, backend)


def test_sharp_softcap_keeps_its_sign_and_size(backend: str) -> None:
    """Scores far below and far above the cap: both ends of the hyperbolic tangent."""
    key_words = backend == "cpu"
    for cap in (1e-3, 1e3):
        options = AttentionOptions(logit_softcap=cap)
        check(reference.make_inputs([3], [90], 4, 2, 16, key_words=key_words, options=options), backend)


PAGES = {
    "all": [[0, 1, 2, 3, 4, 5, 6]] * 2,
    "some, another choice for each head": [[0, 3, 6, -1, -1, -1, -1], [1, 2, 3, 5, 6, -1, -1]],
    "one head sees none": [[-1] * 7, [6, -1, -1, -1, -1, -1, -1]],
}


@on_each_layout
@pytest.mark.parametrize("code", ["float32", "int8", "int4"])
@pytest.mark.parametrize("case", PAGES)
def test_chosen_pages(backend: str, key_words: bool, case: str, code: str) -> None:
    inputs = reference.make_inputs([1, 1], [100, 105], 4, 2, 32, 15, torch.float32, code, code, key_words)
    check({**inputs, "pages": torch.tensor([PAGES[case]] * 2, dtype=torch.int32)}, backend)


@on_each_layout
@pytest.mark.parametrize("case", ["window and sink tokens", "all"])
def test_chosen_pages_with_options(backend: str, key_words: bool, case: str) -> None:
    inputs = reference.make_inputs([1], [100], 4, 2, 32, 15, key_words=key_words, options=OPTIONS[case])
    chosen = [[0, 2, 4, 5, -1], [0, 1, 2, 3, 4]]
    check({**inputs, "pages": torch.tensor([chosen], dtype=torch.int32)}, backend)


@on_each_layout
def test_many_pages_of_a_long_context(backend: str, key_words: bool) -> None:
    inputs = reference.make_inputs([1, 1], [3000, 40], 2, 1, 16, 8, key_words=key_words)
    pages = torch.full((2, 1, 200), -1, dtype=torch.int32)
    pages[0, 0, :188] = torch.arange(0, 375, 2)
    pages[1, 0, :2] = torch.tensor([0, 4])
    check({**inputs, "pages": pages}, backend)


@on_each_layout
def test_pages_that_were_not_chosen_are_not_read(backend: str, key_words: bool) -> None:
    inputs = reference.make_inputs([1], [100], 4, 2, 32, 10, key_words=key_words)
    inputs["pages"] = torch.tensor([[[1, 4, 9]] * 2], dtype=torch.int32)
    plain = paged_attention(**inputs, backend=backend)
    for page in (0, 2, 3, 5, 6, 7, 8):
        inputs["kv_cache"][inputs["block_tables"][0, page]] = 0xFF
    assert torch.equal(paged_attention(**inputs, backend=backend), plain)


@on_each_layout
def test_log_sum_exp_merges_parts(backend: str, key_words: bool) -> None:
    """Two halves of the keys, each attended alone, make the whole: the use of log-sum-exp."""
    inputs = reference.make_inputs([1], [96], 4, 2, 32, 16, key_words=key_words)
    whole = paged_attention(**inputs, backend=backend)
    parts = []
    for begin, end in ((0, 3), (3, 6)):
        part = {**inputs, "block_tables": inputs["block_tables"][:, begin:end].contiguous()}
        part["seq_lens"] = torch.tensor([48], dtype=torch.int32)
        parts.append(paged_attention(**part, return_lse=True, backend=backend))
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = sum(weight[..., None] * out for weight, (out, _) in zip(weights, parts, strict=True))
    assert_close(merged, whole, "attention")


@on_each_layout
@pytest.mark.parametrize("code", ["float32", "bfloat16", *QUANTIZED])
def test_later_tokens_cannot_leak(backend: str, key_words: bool, code: str) -> None:
    inputs = reference.make_inputs([30], [90], 4, 2, 16, key=code, value=code, key_words=key_words)
    clean = paged_attention(**inputs, backend=backend)
    kv_format, slots = inputs["kv_format"], slots_of(inputs, 0, torch.tensor([85]))
    for side in (kv_format.k, kv_format.v):
        kv_format.write(inputs["kv_cache"], side, slots, torch.full((1, 2, 16), torch.nan))
    spoiled = paged_attention(**inputs, backend=backend)
    assert torch.equal(spoiled[:25], clean[:25])
    assert spoiled[25:].isnan().all()


@on_each_layout
def test_strided_queries(backend: str, key_words: bool) -> None:
    inputs = reference.make_inputs([4, 1], [40, 9], 4, 2, 16, key_words=key_words)
    plain = paged_attention(**inputs, backend=backend)
    fused = torch.zeros(5, 8, 16)
    fused[:, :4] = inputs["q"]
    assert torch.equal(paged_attention(**{**inputs, "q": fused[:, :4]}, backend=backend), plain)


@on_each_layout
def test_strided_block_tables(backend: str, key_words: bool) -> None:
    inputs = reference.make_inputs([4, 1], [40, 9], 4, 2, 16, key_words=key_words)
    plain = paged_attention(**inputs, backend=backend)
    wide = torch.full((2, 50), -1, dtype=torch.int32)
    columns = inputs["block_tables"].shape[1]
    wide[:, :columns] = inputs["block_tables"]
    assert torch.equal(paged_attention(**{**inputs, "block_tables": wide[:, :columns]}, backend=backend), plain)


@on_each_layout
@pytest.mark.parametrize("sinks", [0, 5])
def test_freed_blocks_behind_the_window_are_not_read(backend: str, key_words: bool, sinks: int) -> None:
    options = AttentionOptions(sliding_window=20, num_sink_tokens=sinks)
    inputs = reference.make_inputs([2], [100], 2, 1, 8, key_words=key_words, options=options)
    plain = paged_attention(**inputs, backend=backend)
    inputs["block_tables"][0, bool(sinks) : 4] = -1
    assert torch.equal(paged_attention(**inputs, backend=backend), plain)


@on_each_layout
def test_empty_batches(backend: str, key_words: bool) -> None:
    nothing = reference.make_inputs([], [], 4, 2, 16, key_words=key_words)
    assert paged_attention(**nothing, backend=backend).shape == (0, 4, 16)
    no_queries = reference.make_inputs([0, 0], [5, 0], 4, 2, 16, key_words=key_words)
    out, lse = paged_attention(**no_queries, return_lse=True, backend=backend)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


@on_each_layout
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cu_seqlens_q", [0, 2], "cu_seqlens_q"),
        ("seq_lens", [2], "seq_len"),
        ("seq_lens", [1000], "columns"),
        ("block_tables", [[99, 1, 2]], "outside the cache"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    backend: str, key_words: bool, name: str, value: list[Any], message: str
) -> None:
    inputs = reference.make_inputs([3], [20], 2, 1, 8, key_words=key_words)
    inputs[name] = torch.tensor(value, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        paged_attention(**inputs, backend=backend)


@on_each_layout
@pytest.mark.parametrize("pages", [[[1, 0]], [[0, 0]], [[0, 2]], [[-1, 0]]])
def test_pages_that_do_not_fit_are_refused(backend: str, key_words: bool, pages: list[list[int]]) -> None:
    inputs = reference.make_inputs([1], [20], 2, 1, 8, key_words=key_words)
    with pytest.raises(ValueError, match="pages must ascend"):
        paged_attention(**inputs, pages=torch.tensor([pages], dtype=torch.int32), backend=backend)


def test_wrong_shapes_are_named() -> None:
    inputs = reference.make_inputs([3], [20], 3, 1, 8)
    with pytest.raises(ValueError, match="seq_lens|block_tables|cu_seqlens_q"):
        paged_attention(**{**inputs, "seq_lens": inputs["seq_lens"].long()})
    with pytest.raises(ValueError, match="q must be"):
        paged_attention(**{**inputs, "q": inputs["q"][..., :4]})
    with pytest.raises(ValueError, match="pages must be"):
        paged_attention(**inputs, pages=torch.zeros(1, 2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="one query a request"):
        paged_attention(**inputs, pages=torch.zeros(1, 1, 3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (AttentionOptions(sliding_window=-1), "sliding_window is -1"),
        (AttentionOptions(logn_train_len=1), "logn_train_len is 1"),
        (AttentionOptions(num_sink_tokens=2), "num_sink_tokens is 2"),
        (AttentionOptions(sink_logits=torch.zeros(2)), "sink_logits must be"),
        (AttentionOptions(alibi_slopes=torch.zeros(3, dtype=torch.float64)), "alibi_slopes must be"),
    ],
)
def test_wrong_options_are_named(options: AttentionOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_attention(**reference.make_inputs([3], [20], 3, 1, 8, options=options))


def test_triton_says_that_it_reads_keys_as_rows() -> None:
    kv_format = KVFormat("bfloat16", "bfloat16", 2, 64, 16, key_words=True)
    assert "rows" in str(OP.reason_against("triton", "cpu", torch.bfloat16, kv_format=kv_format, num_q_heads=4))
