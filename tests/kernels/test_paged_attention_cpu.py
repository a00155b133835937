"""Owns the tests of what only the native paged attention does: both layouts of keys, mixed dtypes, odd numbers.
Does not know its tiles; the contract that all backends share is tested in test_paged_attention.py."""

from typing import Any

import pytest
import torch
from servd_kernels import native
from servd_kernels.kv_format import CODES, KVFormat
from servd_kernels.paged_attention import AttentionOptions, paged_attention, reference
from servd_kernels.testing import assert_close

pytestmark = pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in native.isas()], indirect=True)


def attend(inputs: dict[str, Any], backend: str) -> torch.Tensor:
    out = paged_attention(**inputs, backend=backend)
    assert isinstance(out, torch.Tensor)
    return out


def as_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same cache with its keys in rows."""
    words: KVFormat = inputs["kv_format"]
    rows = KVFormat(words.key, words.value, words.num_kv_heads, words.head_dim, words.block_size)
    cache = inputs["kv_cache"].clone()
    rows.codes(cache, rows.k).copy_(words.codes(inputs["kv_cache"], words.k))
    return {**inputs, "kv_format": rows, "kv_cache": cache}


def write_token(inputs: dict[str, Any], position: int, number: float, sides: str) -> None:
    """Fills the first request's token at `position` with `number`."""
    kv_format = inputs["kv_format"]
    size = kv_format.block_size
    slot = inputs["block_tables"][0, position // size].long() * size + position % size
    x = torch.full((1, kv_format.num_kv_heads, kv_format.head_dim), number)
    for side in sides:
        kv_format.write(inputs["kv_cache"], getattr(kv_format, side), slot[None], x)


@pytest.mark.parametrize("block_size", [8, 16, 37])
@pytest.mark.parametrize("code", CODES)
def test_rows_and_words_give_the_same_bits(backend: str, code: str, block_size: int) -> None:
    inputs = reference.make_inputs(
        [1, 40], [150, 90], 6, 2, 80, block_size, torch.bfloat16, key=code, value=code, key_words=True
    )
    assert torch.equal(attend(inputs, backend), attend(as_rows(inputs), backend))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_of_another_dtype_than_the_cache(backend: str, dtype: torch.dtype, code: str) -> None:
    for head_dim in (24, 64):
        inputs = reference.make_inputs(
            [3, 1], [70, 33], 4, 2, head_dim, dtype=dtype, key=code, value=code, key_words=True
        )
        wanted = attend({**inputs, "q": inputs["q"].float()}, "reference")
        assert_close(attend(inputs, backend), wanted, "attention")


@pytest.mark.parametrize("code", ["bfloat16", "fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_reaches_the_rows_that_see_it_and_no_other(backend: str, code: str, number: float) -> None:
    """One row's NaN or infinity must not leak to rows of the same tile, in a pair of tokens or a shared product."""
    inputs = reference.make_inputs([60], [90], 4, 2, 64, dtype=torch.bfloat16, key=code, value=code, key_words=True)
    clean = attend(inputs, backend)
    write_token(inputs, 70, number, "kv")
    spoiled = attend(inputs, backend)
    assert torch.equal(spoiled[:40], clean[:40])
    assert not spoiled[40:].isfinite().any()


def test_infinite_queries_give_nan(backend: str) -> None:
    inputs = reference.make_inputs([2], [20], 2, 1, 64, dtype=torch.bfloat16, key="int8", value="int8", key_words=True)
    clean = attend(inputs, backend)
    inputs["q"][0, 0, 3] = torch.inf
    spoiled = attend(inputs, backend)
    assert spoiled[0, 0].isnan().all()
    assert torch.equal(spoiled[1], clean[1]) and torch.equal(spoiled[0, 1], clean[0, 1])


@pytest.mark.parametrize("code", ["bfloat16", "int8", "int4"])
def test_sinks_and_window_over_several_spans(backend: str, code: str) -> None:
    options = AttentionOptions(sliding_window=150, num_sink_tokens=5, logit_softcap=20.0)
    inputs = reference.make_inputs(
        [1, 7], [2300, 1100], 4, 2, 64, dtype=torch.bfloat16, key=code, value=code, key_words=True, options=options
    )
    plain = attend(inputs, backend)
    inputs["block_tables"][0, 1:100] = -1  # freed, behind the window
    assert torch.equal(attend(inputs, backend), plain)
    inputs["block_tables"][0, 1:100] = 0
    wanted = attend({**inputs, "q": inputs["q"].float()}, "reference")
    assert_close(plain, wanted, "attention")
