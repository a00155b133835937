"""Owns the tests of copy_blocks.
Does not know which backends exist (conftest.py)."""

import pytest
import torch
from servd_kernels.copy_blocks import copy_blocks, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("copies", "numel"), [(0, 5), (1, 1), (3, 77), (5, 20000)])
def test_copies_exactly_and_nothing_else(backend: str, copies: int, numel: int, dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(3, 11, numel, copies, dtype)
    before = [cache.clone() for cache in inputs["kv_caches"]]
    copy_blocks(**inputs, backend=backend)
    for old, new in zip(before, inputs["kv_caches"], strict=True):
        old[inputs["dst"]] = old[inputs["src"]]
        assert torch.equal(old, new)


def test_keeps_nan_bits(backend: str) -> None:
    cache = torch.tensor([[0x7FC00001, -1], [0, 0]], dtype=torch.int32).view(torch.float32)
    copy_blocks([cache], torch.tensor([0]), torch.tensor([1]), backend=backend)
    assert cache.view(torch.int32)[1].tolist() == [0x7FC00001, -1]


def test_bad_ids_are_refused_before_any_copy(backend: str) -> None:
    cache = torch.arange(4.0).view(4, 1)
    with pytest.raises(ValueError, match="block ids"):
        copy_blocks([cache], torch.tensor([0, 1]), torch.tensor([2, 4]), backend=backend)
    assert cache.flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("src", "dst"), [([0, 1], [1, 2]), ([0, 1], [2, 2])])
def test_overlap_is_refused(src: list[int], dst: list[int]) -> None:
    with pytest.raises(ValueError, match="must not repeat"):
        copy_blocks([torch.zeros(4, 1)], torch.tensor(src), torch.tensor(dst))
