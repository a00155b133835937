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
    attention = attention_reference.make_inputs([1, 33, 1], [1900, 60, 1], 6, 2, 64, dtype=dtype)
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


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_chunking(backend: str, dtype: torch.dtype, window: int) -> None:
    inputs = attention_reference.make_inputs(
        [1, 70, 23], [50, 640, 23], 6, 2, 40, block_size=8, dtype=dtype, options=AttentionOptions(sliding_window=window)
    )
    whole = paged_attention(**inputs, backend=backend)
    starts = inputs["cu_seqlens_q"].tolist()
    for chunk in (1, 7, 32):
        parts = []
        for request in range(3):
            count = starts[request + 1] - starts[request]
            for begin in range(0, count, chunk):
                step = slice_request(inputs, request, begin, min(begin + chunk, count))
                parts.append(paged_attention(**step, backend=backend))
        assert torch.equal(torch.cat(parts), whole), f"in chunks of {chunk}"


def test_attention_place_in_a_batch_of_64(backend: str) -> None:
    lengths = [1 + 13 * i % 97 for i in range(63)] + [1500]
    inputs = attention_reference.make_inputs([1] * 64, lengths, 6, 2, 64)
    whole = paged_attention(**inputs, backend=backend)
    reordered = {
        **inputs,
        "q": inputs["q"].flip(0),
        "seq_lens": inputs["seq_lens"].flip(0),
        "block_tables": inputs["block_tables"].flip(0),
    }
    assert torch.equal(paged_attention(**reordered, backend=backend).flip(0), whole)
    alone = [paged_attention(**slice_request(inputs, i, 0, 1), backend=backend) for i in range(64)]
    assert torch.equal(torch.cat(alone), whole)


def test_block_size_changes_nothing(backend: str) -> None:
    outs = [
        paged_attention(
            **attention_reference.make_inputs([1, 9], [600, 30], 4, 2, 64, block_size=size),
            backend=backend,
        )
        for size in (1, 16, 37)
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
