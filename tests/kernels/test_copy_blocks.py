"""Owns the tests of copy_blocks.
Does not know which backends exist (conftest.py)."""

import pytest
import torch
from servd_kernels.copy_blocks import copy_blocks, reference
from servd_kernels.kv_format import CODES, KVFormat


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    ("copies", "numels"),
    [(0, [5, 5]), (1, [1, 1]), (3, [77, 77]), (5, [20000, 20000]), (4, [64, 7, 1024]), (2, [16, 4096, 32])],
)
def test_copies_exactly_and_nothing_else(backend: str, copies: int, numels: list[int], dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(numels, 11, copies, dtype)
    before = [cache.clone() for cache in inputs["kv_caches"]]
    copy_blocks(**inputs, backend=backend)
    for old, new in zip(before, inputs["kv_caches"], strict=True):
        old[inputs["dst"]] = old[inputs["src"]]
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


def test_layers_of_every_format_in_one_call(backend: str) -> None:
    formats = [KVFormat(code, code, 2, 24, 5) for code in CODES]
    caches = [torch.randint(0, 256, (4, item.block_bytes), dtype=torch.uint8) for item in formats]
    before = [cache.clone() for cache in caches]
    copy_blocks(caches, torch.tensor([3, 1]), torch.tensor([0, 2]), backend=backend)
    for old, new in zip(before, caches, strict=True):
        assert torch.equal(new, old[[3, 1, 1, 3]])


def test_blocks_of_a_wider_tensor(backend: str) -> None:
    whole = torch.arange(60, dtype=torch.uint8).view(6, 10)
    part, before = whole[:, 2:7], whole.clone()
    copy_blocks([part], torch.tensor([5]), torch.tensor([0]), backend=backend)
    before[0, 2:7] = before[5, 2:7]
    assert torch.equal(whole, before)


def test_keeps_nan_bits(backend: str) -> None:
    cache = torch.tensor([[0x7FC00001, -1], [0, 0]], dtype=torch.int32).view(torch.float32)
    copy_blocks([cache], torch.tensor([0]), torch.tensor([1]), backend=backend)
    assert cache.view(torch.int32)[1].tolist() == [0x7FC00001, -1]


def test_bad_ids_are_refused_before_any_copy(backend: str) -> None:
    cache = torch.arange(4.0).view(4, 1)
    with pytest.raises(ValueError, match="block ids"):
        copy_blocks([cache], torch.tensor([0, 1]), torch.tensor([2, 4]), backend=backend)
    assert cache.flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("src", "dst", "message"), [([0, 1], [1, 2], "must not be in src"), ([0, 1], [2, 2], "must not repeat")]
)
def test_overlap_is_refused(src: list[int], dst: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copy_blocks([torch.zeros(4, 1)], torch.tensor(src), torch.tensor(dst))


def test_layers_that_do_not_fit_are_refused() -> None:
    ids = torch.tensor([0]), torch.tensor([1])
    with pytest.raises(ValueError, match="one num_blocks"):
        copy_blocks([torch.zeros(4, 1), torch.zeros(5, 1)], *ids)
    with pytest.raises(ValueError, match="contiguous blocks"):
        copy_blocks([torch.zeros(4, 6)[:, ::2]], *ids)
