"""Owns the tests of select_pages, and of what it is for: decodes that read the chosen pages alone.
Does not know which backends exist (conftest.py)."""

from typing import Any

import pytest
import torch
from servd_kernels import native
from servd_kernels.page_bounds import page_bounds
from servd_kernels.paged_attention import paged_attention
from servd_kernels.paged_attention import reference as attention_reference
from servd_kernels.select_pages import reference, select_pages
from servd_kernels.testing import assert_close

NATIVE_VARIANTS = [f"cpu-{isa}" for isa in native.isas()]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def upper_bounds(inputs: dict[str, Any], request: int) -> torch.Tensor:
    """Of each page and kv head, in float64."""
    kv_format = inputs["kv_format"]
    count = -(-int(inputs["seq_lens"][request]) // kv_format.block_size)
    least, most = inputs["bounds"][inputs["block_tables"][request, :count].long()].double().unbind(2)
    q = inputs["q"][request].double().view(kv_format.num_kv_heads, -1, kv_format.head_dim)
    products = torch.maximum(q * least[:, :, None], q * most[:, :, None])
    return products.sum(-1).amax(-1)  # [num_pages, num_kv_heads]


@pytest.mark.parametrize("bounds_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim", "top_k"), [((9, 3), 64, 5), ((4, 1), 24, 2), ((2, 2), 80, 40)])
def test_chosen_pages_score_above_the_others(
    backend: str, heads: tuple[int, int], head_dim: int, top_k: int, dtype: torch.dtype, bounds_dtype: torch.dtype
) -> None:
    lengths = [1, 0, 530, 7 * 16, 90]
    inputs = reference.make_inputs(lengths, *heads, head_dim, top_k, dtype=dtype, bounds_dtype=bounds_dtype)
    pages = select_pages(**inputs, backend=backend)
    assert pages.shape == (len(lengths), heads[1], top_k) and pages.dtype == torch.int32
    for request, length in enumerate(lengths):
        count = -(-length // 16)
        scores = upper_bounds(inputs, request)
        for head in range(heads[1]):
            row = pages[request, head].tolist()
            kept = row[: min(count, top_k)]
            assert row[len(kept) :] == [-1] * (top_k - len(kept))
            assert kept == sorted(set(kept)) and all(0 <= page < count for page in kept)
            if count == 0:
                continue
            assert kept[0] == 0 and kept[-1] == count - 1
            left = [page for page in range(count) if page not in kept]
            free = kept[1:-1]
            if left and free:
                assert scores[free, head].min() >= scores[left, head].max() - 1e-4


def test_exact_scores_choose_the_same_pages_as_the_reference(backend: str) -> None:
    """Small integers: sums are exact in any order, and there are many ties."""
    inputs = reference.make_inputs([1000, 500], 4, 2, 16, 9)
    generator = torch.Generator().manual_seed(3)
    inputs["q"] = torch.randint(-2, 3, inputs["q"].shape, generator=generator).float()
    ends = torch.randint(-2, 3, inputs["bounds"].shape, generator=generator).sort(2).values
    inputs["bounds"] = ends.to(torch.bfloat16)
    assert torch.equal(select_pages(**inputs, backend=backend), reference.run(**inputs))


def test_of_equal_scores_the_lower_page_goes_first(backend: str) -> None:
    inputs = reference.make_inputs([160], 2, 1, 8, 4)
    inputs["bounds"].fill_(1.0)
    assert select_pages(**inputs, backend=backend).tolist() == [[[0, 1, 2, 9]]]


def test_nan_is_read_rather_than_hidden(backend: str) -> None:
    inputs = reference.make_inputs([160], 2, 1, 8, 3)
    inputs["bounds"][inputs["block_tables"][0, 6], 0, :, 5] = torch.nan
    assert select_pages(**inputs, backend=backend).tolist() == [[[0, 6, 9]]]


def test_more_nan_pages_than_room_still_keep_first_and_last(backend: str) -> None:
    inputs = reference.make_inputs([160], 2, 1, 8, 3)
    inputs["bounds"].fill_(torch.nan)
    assert select_pages(**inputs, backend=backend).tolist() == [[[0, 1, 9]]]


def test_pages_do_not_depend_on_the_batch(backend: str) -> None:
    lengths = [16 * (3 + 7 * i % 40) for i in range(12)]
    inputs = reference.make_inputs(lengths, 6, 2, 64, 6, dtype=torch.bfloat16)
    whole = select_pages(**inputs, backend=backend)
    for request in range(12):
        alone = {
            **inputs,
            "q": inputs["q"][request : request + 1],
            "seq_lens": inputs["seq_lens"][request : request + 1],
            "block_tables": inputs["block_tables"][request : request + 1, : lengths[request] // 16].contiguous(),
        }
        assert torch.equal(select_pages(**alone, backend=backend), whole[request : request + 1])


@pytest.mark.parametrize("backend", NATIVE_VARIANTS, indirect=True)  # torch's threads are not ours to set
def test_threads_change_nothing(backend: str, restore_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        inputs = reference.make_inputs([5000, 3000], 9, 3, 64, 20, dtype=torch.bfloat16)
        results.append(select_pages(**inputs, backend=backend))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seq_lens", [-1], "0 or more"),
        ("seq_lens", [1000], "columns"),
        ("block_tables", [[99, 1, 2]], "outside the cache"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(backend: str, name: str, value: list[Any], message: str) -> None:
    inputs = reference.make_inputs([20], 2, 1, 8, 2)
    inputs[name] = torch.tensor(value, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        select_pages(**inputs, backend=backend)


def test_wrong_shapes_are_named() -> None:
    inputs = reference.make_inputs([20], 2, 1, 8, 2)
    with pytest.raises(ValueError, match="top_k is 1; allowed: 2 or more"):
        select_pages(**{**inputs, "top_k": 1})
    with pytest.raises(ValueError, match="q must be"):
        select_pages(**{**inputs, "q": inputs["q"][..., :4]})
    with pytest.raises(ValueError, match="bounds must be"):
        select_pages(**{**inputs, "bounds": inputs["bounds"].half()})


# --- with attention -----------------------------------------------------------------------------------


def decode_step(seq_len: int, key: str, top_k: int, needle: int | None = None) -> tuple[dict[str, Any], torch.Tensor]:
    """One decode of 2 query heads over float32-sized queries, and its chosen pages; `needle`: a page that is given a
    key in the direction of the query, on which attention must land."""
    inputs = attention_reference.make_inputs([1], [seq_len], 2, 1, 64, key=key, value="float32")
    kv_format, cache, table = inputs["kv_format"], inputs["kv_cache"], inputs["block_tables"]
    places = torch.arange(seq_len)
    slots = table[0].long()[places // 16] * 16 + places % 16
    if needle is not None:
        strong = inputs["q"][0].mean(0) * 12
        kv_format.write(cache, kv_format.k, slots[needle * 16 + 5 : needle * 16 + 6], strong.view(1, 1, 64))
    bounds = torch.full((len(cache), 1, 2, 64), torch.nan)
    page_bounds(cache, kv_format, slots, bounds)
    pages = select_pages(inputs["q"], bounds, kv_format, inputs["seq_lens"], table, top_k)
    return inputs, pages


@pytest.mark.parametrize("key", ["float32", "int8", "int4"])
def test_with_room_for_all_pages_attention_is_dense(key: str) -> None:
    inputs, pages = decode_step(300, key, top_k=19)
    dense = paged_attention(**inputs, backend="reference")
    assert torch.equal(paged_attention(**inputs, pages=pages, backend="reference"), dense)


@pytest.mark.parametrize("key", ["float32", "fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("needle", [0, 1, 11, 30])
def test_the_page_of_a_needle_is_chosen(key: str, needle: int) -> None:
    inputs, pages = decode_step(500, key, top_k=4, needle=needle)
    assert needle in pages.flatten().tolist()
    dense = paged_attention(**inputs, backend="reference")
    assert_close(paged_attention(**inputs, pages=pages, backend="reference"), dense, "attention", scale=1e4)
