"""Owns the tests of paged_attention.
Does not know which backends exist (conftest.py)."""

from typing import Any

import pytest
import torch
from servd_kernels.paged_attention import AttentionOptions, paged_attention, reference
from servd_kernels.testing import assert_close


def slots_of(inputs: dict[str, Any], request: int, positions: torch.Tensor) -> torch.Tensor:
    size = inputs["kv_format"].block_size
    return inputs["block_tables"][request].long()[positions // size] * size + positions % size


def expected(inputs: dict[str, Any]) -> torch.Tensor:
    """Dense masked attention, in float64, a request at a time."""
    q, kv_format, window = inputs["q"].double(), inputs["kv_format"], inputs["options"].sliding_window
    group = q.shape[1] // kv_format.num_kv_heads
    out = torch.zeros_like(q)
    starts = inputs["cu_seqlens_q"].tolist()
    for request, length in enumerate(inputs["seq_lens"].tolist()):
        rows = slice(starts[request], starts[request + 1])
        slots = slots_of(inputs, request, torch.arange(length))
        keys, values = (
            kv_format.read(inputs["kv_cache"], side, slots).double().transpose(0, 1).repeat_interleave(group, 0)
            for side in (kv_format.k, kv_format.v)
        )
        scores = torch.einsum("nhd,htd->hnt", q[rows], keys) * inputs["scale"]
        count = rows.stop - rows.start
        behind = torch.arange(length - count, length)[:, None] - torch.arange(length)
        hidden = (behind < 0) | (behind >= window if window else torch.tensor(False))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("hnt,htd->nhd", weights, values)
    return out


CASES = {
    "one token": ([1], [1], 1, 1),
    "decode": ([1, 1, 1], [5, 48, 49], 9, 3),
    "prefill": ([53], [53], 6, 2),
    "mixed": ([1, 0, 17, 1, 40], [100, 9, 17, 1, 97], 4, 1),
    "wide group": ([3], [20], 40, 1),
    "several spans": ([2, 5], [1300, 580], 2, 2),
}


@pytest.mark.parametrize("window", [0, 1, 47, 48, 49, 60, 5000])  # a tile holds 48 keys
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(backend: str, case: str, window: int) -> None:
    options = AttentionOptions(sliding_window=window)
    inputs = reference.make_inputs(*CASES[case], head_dim=24, block_size=7, options=options)
    assert_close(paged_attention(**inputs, backend=backend), expected(inputs), "attention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 128, 256])
def test_head_dims_and_dtypes(backend: str, head_dim: int, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs([1, 19], [70, 50], 6, 2, head_dim, dtype=dtype)
    assert_close(paged_attention(**inputs, backend=backend), expected(inputs), "attention")


def test_later_tokens_cannot_leak(backend: str) -> None:
    inputs = reference.make_inputs([30], [90], 4, 2, 16)
    clean = paged_attention(**inputs, backend=backend)
    kv_format = inputs["kv_format"]
    kv_format.write(
        inputs["kv_cache"], kv_format.v, slots_of(inputs, 0, torch.tensor([85])), torch.full((1, 2, 16), torch.nan)
    )
    spoiled = paged_attention(**inputs, backend=backend)
    assert torch.equal(spoiled[:25], clean[:25])
    assert spoiled[25:].isnan().all()


def test_strided_queries(backend: str) -> None:
    inputs = reference.make_inputs([4, 1], [40, 9], 4, 2, 16)
    plain = paged_attention(**inputs, backend=backend)
    fused = torch.zeros(5, 8, 16)
    fused[:, :4] = inputs["q"]
    assert torch.equal(paged_attention(**{**inputs, "q": fused[:, :4]}, backend=backend), plain)


def test_freed_blocks_behind_the_window_are_not_read(backend: str) -> None:
    inputs = reference.make_inputs([2], [100], 2, 1, 8, options=AttentionOptions(sliding_window=20))
    plain = paged_attention(**inputs, backend=backend)
    inputs["block_tables"][0, :4] = -1
    assert torch.equal(paged_attention(**inputs, backend=backend), plain)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cu_seqlens_q", [0, 2], "cu_seqlens_q"),
        ("seq_lens", [2], "seq_len"),
        ("seq_lens", [1000], "columns"),
        ("block_tables", [[99, 1, 2]], "outside the cache"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(backend: str, name: str, value: list[Any], message: str) -> None:
    inputs = reference.make_inputs([3], [20], 2, 1, 8)
    inputs[name] = torch.tensor(value, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        paged_attention(**inputs, backend=backend)


def test_wrong_shapes_are_named() -> None:
    inputs = reference.make_inputs([3], [20], 3, 1, 8)
    with pytest.raises(ValueError, match="seq_lens|block_tables|cu_seqlens_q"):
        paged_attention(**{**inputs, "seq_lens": inputs["seq_lens"].long()})
    with pytest.raises(ValueError, match="q must be"):
        paged_attention(**{**inputs, "q": inputs["q"][..., :4]})
