"""Owns the tests of page_bounds.
Does not know which backends exist (conftest.py)."""

from typing import Any

import pytest
import torch
from servd_kernels import native
from servd_kernels.kv_format import CODES
from servd_kernels.page_bounds import page_bounds, reference

NATIVE_VARIANTS = [f"cpu-{isa}" for isa in native.isas()]

SHAPES = [(1, 1, 8, 1), (37, 3, 64, 16), (20, 2, 80, 7), (9, 1, 24, 3), (130, 2, 16, 64)]


def layouts(backend: str) -> list[bool]:
    """The values of key_words that a backend has: GPUs read rows."""
    return [False] if backend == "triton" else [False, True]


def pages_of(inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
    """Of each page the keys that it holds, decoded."""
    kv_format, slots = inputs["kv_format"], inputs["slot_mapping"]
    keys = kv_format.read(inputs["kv_cache"], kv_format.k, slots)
    blocks = slots // kv_format.block_size
    return {block: keys[blocks == block] for block in blocks.tolist()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("code", CODES)
def test_bounds_are_the_extremes_of_the_decoded_keys(backend: str, code: str, shape: tuple[int, ...]) -> None:
    for key_words in layouts(backend):
        inputs = reference.make_inputs(*shape, key=code, key_words=key_words)
        out = page_bounds(**inputs, backend=backend)
        assert out.data_ptr() == inputs["bounds"].data_ptr()
        pages = pages_of(inputs)
        for block, keys in pages.items():
            assert torch.equal(out[block, :, 0], keys.amin(0)) and torch.equal(out[block, :, 1], keys.amax(0))
        others = [block for block in range(len(out)) if block not in pages]
        assert out[others].isnan().all()


@pytest.mark.parametrize("code", ["float32", "int8"])
def test_bfloat16_is_rounded_outwards_by_less_than_a_step(backend: str, code: str) -> None:
    inputs = reference.make_inputs(37, 2, 64, dtype=torch.bfloat16, key=code)
    out = page_bounds(**inputs, backend=backend).float()
    for block, keys in pages_of(inputs).items():
        least, most = keys.amin(0), keys.amax(0)
        assert (out[block, :, 0] <= least).all() and (out[block, :, 1] >= most).all()
        assert (least - out[block, :, 0] <= least.abs() * 2**-7).all()
        assert (out[block, :, 1] - most <= most.abs() * 2**-7).all()


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_chunks_change_nothing(backend: str, chunk: int) -> None:
    whole, parts = (reference.make_inputs(37, 2, 16, block_size=8, key="int4") for _ in range(2))
    page_bounds(**whole, backend=backend)
    for slots in parts["slot_mapping"].split(chunk):
        page_bounds(**{**parts, "slot_mapping": slots}, backend=backend)
    assert torch.equal(
        whole["bounds"].view(torch.int32), parts["bounds"].view(torch.int32)
    )  # as bits: what no one wrote is NaN


def test_a_draft_taken_back_leaves_no_trace(backend: str) -> None:
    inputs = reference.make_inputs(5, 1, 8, block_size=8)
    page_bounds(**inputs, backend=backend)
    kv_format, slot = inputs["kv_format"], inputs["slot_mapping"][-1:]
    kept = torch.full((1, 1, 8), 0.125)
    for keys in (torch.full((1, 1, 8), 100.0), kept):
        kv_format.write(inputs["kv_cache"], kv_format.k, slot, keys)
        page_bounds(**{**inputs, "slot_mapping": slot}, backend=backend)
    for block, keys in pages_of(inputs).items():
        assert torch.equal(inputs["bounds"][block, :, 1], keys.amax(0))
        assert (inputs["bounds"][block] < 100).all()


def test_a_block_s_former_keys_are_forgotten(backend: str) -> None:
    inputs = reference.make_inputs(8, 1, 8, block_size=8)
    page_bounds(**inputs, backend=backend)
    kv_format, slot = inputs["kv_format"], inputs["slot_mapping"][:1]
    kv_format.write(inputs["kv_cache"], kv_format.k, slot, torch.zeros(1, 1, 8))
    out = page_bounds(**{**inputs, "slot_mapping": slot}, backend=backend)
    assert (out[slot // 8] == 0).all()


def test_tokens_without_a_slot_and_empty_steps(backend: str) -> None:
    inputs = reference.make_inputs(10, 1, 8, block_size=4)
    expected = page_bounds(**inputs, backend=backend).clone()
    inputs["bounds"].fill_(torch.nan)
    inputs["slot_mapping"] = torch.cat([inputs["slot_mapping"], torch.tensor([-1, -1])])
    assert torch.equal(page_bounds(**inputs, backend=backend).nan_to_num(9.0), expected.nan_to_num(9.0))
    none = {**inputs, "slot_mapping": inputs["slot_mapping"][:0]}
    assert torch.equal(page_bounds(**none, backend=backend).nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_kept(backend: str, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(6, 1, 8, block_size=3, dtype=dtype)
    kv_format, slots = inputs["kv_format"], inputs["slot_mapping"]
    for bad in (1, 5):
        key = torch.zeros(1, 1, 8)
        key[..., 3] = torch.nan
        kv_format.write(inputs["kv_cache"], kv_format.k, slots[bad : bad + 1], key)
    out = page_bounds(**inputs, backend=backend)[slots // 3]
    assert out[..., 3].isnan().all() and out[..., :3].isfinite().all() and out[..., 4:].isfinite().all()


@pytest.mark.parametrize("backend", NATIVE_VARIANTS, indirect=True)  # torch's threads are not ours to set
def test_threads_change_nothing(backend: str, restore_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        inputs = reference.make_inputs(2000, 3, 64, key="int8", dtype=torch.bfloat16)
        results.append(page_bounds(**inputs, backend=backend).view(torch.int16))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bad_slots_are_refused_before_any_write(backend: str) -> None:
    for slot in (-2, 10**6):
        inputs = reference.make_inputs(3, 1, 8)
        inputs["slot_mapping"][1] = slot
        with pytest.raises(ValueError, match=r"slots must be in -1\.\."):
            page_bounds(**inputs, backend=backend)
        assert inputs["bounds"].isnan().all()


def test_wrong_shapes_are_named() -> None:
    inputs = reference.make_inputs(3, 1, 8)
    with pytest.raises(ValueError, match=r"bounds must be contiguous float32 or bfloat16 \[3, 1, 2, 8\]"):
        page_bounds(**{**inputs, "bounds": inputs["bounds"].half()})
    with pytest.raises(ValueError, match="slot_mapping must be int64"):
        page_bounds(**{**inputs, "slot_mapping": inputs["slot_mapping"].int()})
