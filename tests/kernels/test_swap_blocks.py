"""Owns the tests of swap_blocks.
Does not know which backends exist (conftest.py)."""

import pytest
import torch
from servd_kernels.kv_format import CODES, KVFormat
from servd_kernels.swap_blocks import OP, library, reference, swap_blocks


@pytest.mark.parametrize("numels", [[5, 5], [16, 4096, 32], [77, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_copies_exactly_and_nothing_else(backend: str, numels: list[int], dtype: torch.dtype) -> None:
    inputs = reference.make_inputs(numels, 9, 6, 4, dtype)
    sources, before = ([cache.clone() for cache in inputs[name]] for name in ("src_caches", "dst_caches"))
    swap_blocks(**inputs, backend=backend)
    for layer, old in enumerate(before):
        old[inputs["dst"]] = sources[layer][inputs["src"]]
        assert torch.equal(inputs["dst_caches"][layer].view(torch.uint8), old.view(torch.uint8))
        assert torch.equal(inputs["src_caches"][layer].view(torch.uint8), sources[layer].view(torch.uint8))


def test_every_format_goes_out_and_comes_back(backend: str) -> None:
    formats = [KVFormat(code, code, 2, 24, 5) for code in CODES]
    device, host = ([torch.randint(0, 256, (n, f.block_bytes), dtype=torch.uint8) for f in formats] for n in (6, 4))
    before = [cache.clone() for cache in device]
    blocks, places = torch.tensor([4, 1, 2]), torch.tensor([0, 3, 1])
    swap_blocks(device, host, blocks, places, backend=backend)
    for cache in device:
        cache[blocks] = 0
    swap_blocks(host, device, places, torch.tensor([5, 0, 3]), backend=backend)
    for old, new in zip(before, device, strict=True):
        assert torch.equal(new[[5, 0, 3]], old[blocks])


def test_bad_ids_are_refused_before_any_copy(backend: str) -> None:
    source, target = torch.ones(4, 1), torch.zeros(2, 1)
    for src, dst in (([0, 3], [0, 2]), ([0, 4], [0, 1]), ([-1], [0])):
        with pytest.raises(ValueError, match="block ids"):
            swap_blocks([source], [target], torch.tensor(src), torch.tensor(dst), backend=backend)
    assert (target == 0).all()


def test_nothing_to_move(backend: str) -> None:
    none = torch.tensor([], dtype=torch.int64)
    target = torch.zeros(2, 1)
    swap_blocks([torch.ones(4, 1)], [target], none, none, backend=backend)
    assert (target == 0).all()


def test_caches_that_do_not_fit_are_refused() -> None:
    ids = torch.tensor([0]), torch.tensor([1])
    with pytest.raises(ValueError, match=r"blocks of \[4\] bytes"):
        swap_blocks([torch.zeros(4, 1)], [torch.zeros(4, 2)], *ids)
    with pytest.raises(ValueError, match="2 layers"):
        swap_blocks([torch.zeros(4, 1)] * 2, [torch.zeros(4, 1)], *ids)
    with pytest.raises(ValueError, match="must not repeat"):
        swap_blocks([torch.zeros(4, 1)], [torch.zeros(4, 1)], torch.tensor([0, 1]), torch.tensor([1, 1]))


# The copy engines' backend serves GPUs alone; its arithmetic of runs is the same on any device.


def test_copy_engines_are_not_chosen_on_cpu() -> None:
    assert OP.bind("cpu", torch.uint8).__module__ != "servd_kernels.swap_blocks.library"
    with pytest.raises(ValueError, match="copy engines of a GPU"):
        OP.bind("cpu", torch.uint8, backend="library")


def test_neighbouring_blocks_go_in_one_copy() -> None:
    assert list(library.runs([3, 4, 5, 9, 1, 2], [0, 1, 2, 3, 7, 9])) == [(3, 0, 3), (9, 3, 1), (1, 7, 1), (2, 9, 1)]
    assert list(library.runs([], [])) == []


def test_copy_engines_move_the_same_bytes() -> None:
    ours, expected = (reference.make_inputs([16, 48], 9, 7, 6) for _ in range(2))
    for inputs in (ours, expected):
        inputs["src"], inputs["dst"] = torch.tensor([2, 3, 4, 0, 8]), torch.tensor([1, 2, 3, 6, 0])
    library.run(**ours)
    reference.run(**expected)
    for actual, other in zip(ours["dst_caches"], expected["dst_caches"], strict=True):
        assert torch.equal(actual, other)
