"""Owns the tests that a row's bits depend on that row alone: not on batch, place, chunking or threads.
Does not know how a backend achieves it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from servd_kernels import native
from servd_kernels.linear import linear, pack
from servd_kernels.linear import reference as linear_reference
from servd_kernels.paged_attention import AttentionOptions, paged_attention
from servd_kernels.paged_attention import reference as attention_reference
from servd_kernels.rms_norm import rms_norm
from servd_kernels.silu_and_mul import silu_and_mul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 64
NATIVE_VARIANTS = [f"cpu-{isa}" for isa in native.isas()]


def row_functions(backend: str, dtype: torch.dtype, width: int) -> dict[str, Callable[[Any], Any]]:
    weight = linear_reference.make_inputs(1, 101, width, dtype=dtype)["weight"]
    packed = pack(weight, backend)
    gain = torch.linspace(0.5, 1.5, width).to(dtype)
    return {
        "linear": lambda x: linear(x, packed),
        "rms_norm": lambda x: rms_norm(x, gain, 1e-5, backend=backend),
        "silu_and_mul": lambda x: silu_and_mul(x, backend=backend),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear", "rms_norm", "silu_and_mul"])
def test_a_row_alone_in_a_few_and_elsewhere(backend: str, op: str, dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, 578, generator=torch.Generator().manual_seed(1)).to(dtype)
    run = row_functions(backend, dtype, 578)[op]
    whole = run(x)
    for size in (1, 7, 9, 33):
        parts = torch.cat([run(part) for part in x.split(size)])
        assert torch.equal(parts, whole), f"in parts of {size}"
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))
    assert torch.equal(run(x[order]), whole[order])


@pytest.mark.parametrize("backend", NATIVE_VARIANTS, indirect=True)  # torch's threads are not ours to set
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(backend: str, restore_threads: None, dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, 578, generator=torch.Generator().manual_seed(1)).to(dtype)
    attention = attention_inputs(backend, [1, 33, 1], [1900, 60, 1], 6, 2, 64, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        outs = [run(x) for run in row_functions(backend, dtype, 578).values()]
        results.append([*outs, paged_attention(**attention, backend=backend)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def slice_request(inputs: dict[str, Any], request: int, begin: int, end: int) -> dict[str, Any]:
    """Queries begin..end of one request, as the step that would have computed them alone."""
    first, last = inputs["cu_seqlens_q"][request : request + 2].tolist()
    length = int(inputs["seq_lens"][request]) - (last - first) + end
    return {
        **inputs,
        "q": inputs["q"][first + begin : first + end],
        "cu_seqlens_q": torch.tensor([0, end - begin], dtype=torch.int32),
        "seq_lens": torch.tensor([length], dtype=torch.int32),
        "block_tables": inputs["block_tables"][request : request + 1],
    }


def attention_inputs(backend: str, *sizes: Any, **kinds: Any) -> dict[str, Any]:
    """Inputs with keys laid as the backend reads them: native kernels want words."""
    return attention_reference.make_inputs(*sizes, **kinds, key_words=backend == "cpu")


SINK_LOGITS = torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0, 2.0])
OPTIONS = {
    "plain": AttentionOptions(),
    "window": AttentionOptions(sliding_window=100),
    "all": AttentionOptions(20, SINK_LOGITS.abs() / 8, 5.0, 200, 10, SINK_LOGITS),
}
KINDS = [
    (torch.float32, "float32", "plain"),
    (torch.bfloat16, "bfloat16", "plain"),
    (torch.bfloat16, "bfloat16", "window"),
    (torch.float32, "float32", "all"),
    (torch.float16, "float16", "all"),
    (torch.bfloat16, "fp8_e4m3", "all"),
    (torch.bfloat16, "int8", "all"),
    (torch.bfloat16, "int4", "all"),
]


@pytest.mark.parametrize(("dtype", "code", "options"), KINDS)
def test_attention_chunking(backend: str, dtype: torch.dtype, code: str, options: str) -> None:
    inputs = attention_inputs(
        backend, [1, 37, 9], [50, 590, 9], 6, 2, 40,
        block_size=8, dtype=dtype, key=code, value=code, options=OPTIONS[options],
    )  # fmt: skip
    whole = paged_attention(**inputs, return_lse=True, backend=backend)
    starts = inputs["cu_seqlens_q"].tolist()
    for request in range(3):
        count = starts[request + 1] - starts[request]
        chunks = [(begin, begin + 1) for begin in sorted({0, 3, 8, count // 2, count - 1}) if begin < count]
        for size in (7, 32):
            chunks += [(begin, min(begin + size, count)) for begin in range(0, count, size)]
        for begin, end in chunks:
            rows = slice(starts[request] + begin, starts[request] + end)
            step = slice_request(inputs, request, begin, end)
            out, lse = paged_attention(**step, return_lse=True, backend=backend)
            assert torch.equal(out, whole[0][rows]), f"queries {begin}..{end} of request {request} alone"
            assert torch.equal(lse, whole[1][rows]), f"lse of queries {begin}..{end} of request {request} alone"


@pytest.mark.parametrize("code", ["float32", "int8"])
def test_attention_place_in_a_batch_of_64(backend: str, code: str) -> None:
    lengths = [1 + 13 * i % 97 for i in range(63)] + [600]
    inputs = attention_inputs(backend, [1] * 64, lengths, 3, 1, 64, key=code, value=code)
    whole = paged_attention(**inputs, backend=backend)
    reordered = {
        **inputs,
        "q": inputs["q"].flip(0),
        "seq_lens": inputs["seq_lens"].flip(0),
        "block_tables": inputs["block_tables"].flip(0),
    }
    assert torch.equal(paged_attention(**reordered, backend=backend).flip(0), whole)
    for i in (0, 7, 31, 63):
        assert torch.equal(paged_attention(**slice_request(inputs, i, 0, 1), backend=backend), whole[i : i + 1])


def test_attention_beside_a_prefill(backend: str) -> None:
    """Decodes of a mixed step, of which one spans several splits, equal decodes alone."""
    inputs = attention_inputs(backend, [1, 90, 1, 3], [1200, 90, 30, 700], 6, 2, 64, dtype=torch.bfloat16)
    whole = paged_attention(**inputs, backend=backend)
    starts = inputs["cu_seqlens_q"].tolist()
    for request in (0, 2, 3):
        count = starts[request + 1] - starts[request]
        alone = paged_attention(**slice_request(inputs, request, 0, count), backend=backend)
        assert torch.equal(alone, whole[starts[request] : starts[request + 1]]), f"request {request}"


@pytest.mark.parametrize("code", ["float32", "int8", "int4"])
def test_all_pages_are_the_whole_attention(backend: str, code: str) -> None:
    inputs = attention_inputs(backend, [1, 1], [1100, 90], 4, 2, 64, key=code, value=code)
    pages = torch.full((2, 2, 70), -1, dtype=torch.int32)
    for request, blocks in enumerate((69, 6)):
        pages[request, :, :blocks] = torch.arange(blocks)
    whole = paged_attention(**inputs, backend=backend)
    assert torch.equal(paged_attention(**inputs, pages=pages, backend=backend), whole)


@pytest.mark.parametrize("code", ["float32", "int4"])
def test_block_size_changes_nothing(backend: str, code: str) -> None:
    outs = [
        paged_attention(
            **attention_inputs(backend, [1, 9], [600, 30], 4, 2, 64, block_size=size, key=code, value=code),
            backend=backend,
        )
        for size in (1, 16, 37)
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
