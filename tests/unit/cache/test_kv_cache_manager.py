"""Tables, prefix hits and copy-on-write: exact ids."""

import pytest

from servd.cache.kv_cache_manager import KVCacheManager
from servd.request import Request
from servd.sampling_params import SamplingParams

BLOCK = 4


def make_request(request_id: str, tokens: list[int], **kwargs) -> Request:
    params = kwargs.pop("params", SamplingParams(max_tokens=64))
    return Request(request_id, tokens, params, max_model_len=1000, **kwargs)


def run_prefill(manager: KVCacheManager, request: Request) -> int:
    """Compute the whole prompt; returns the tokens the cache gave."""
    cached = manager.attach_cached_prefix(request)
    assert manager.allocate_slots(request, cached, request.num_tokens - cached) is not None
    manager.cache_full_blocks(request, request.num_tokens)
    return cached


@pytest.fixture
def manager():
    manager = KVCacheManager(num_blocks=9, block_size=BLOCK)
    yield manager
    manager.check_integrity()


def test_blocks_are_allocated_as_tokens_need_them(manager):
    request = make_request("a", list(range(6)))
    assert manager.attach_cached_prefix(request) == 0
    assert manager.allocate_slots(request, 0, 3).new_block_ids == [1]
    assert manager.allocate_slots(request, 3, 1).new_block_ids == []
    assert manager.allocate_slots(request, 4, 2).new_block_ids == [2]
    assert manager.block_ids(request) == [1, 2]


def test_no_room_changes_nothing(manager):
    request = make_request("a", list(range(40)))
    manager.attach_cached_prefix(request)
    assert manager.allocate_slots(request, 0, 40) is None
    assert manager.block_ids(request) == []
    assert manager.pool.num_free == 8


def test_a_prefix_hit_shares_full_blocks_but_leaves_the_last_token(manager):
    first = make_request("a", list(range(8)))
    assert run_prefill(manager, first) == 0
    # All 8 tokens are cached, but the last must be computed for its logits: one block is shared, not two.
    second = make_request("b", list(range(8)))
    assert run_prefill(manager, second) == 4
    assert manager.block_ids(first) == [1, 2]
    assert manager.block_ids(second) == [1, 3]


def test_a_prefix_survives_its_request_until_evicted_tail_first(manager):
    first = make_request("a", list(range(12)))
    run_prefill(manager, first)
    manager.free(first)
    big = make_request("big", list(range(100, 100 + 6 * BLOCK)))
    run_prefill(manager, big)  # takes 5 fresh blocks and evicts one: the tail of `first`
    again = make_request("b", list(range(13)))
    assert manager.attach_cached_prefix(again) == 8
    assert manager.block_ids(again) == [1, 2]


def test_a_block_is_found_only_behind_the_same_prefix(manager):
    run_prefill(manager, make_request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    other = make_request("b", [9, 9, 9, 9, 5, 6, 7, 8, 9])
    assert manager.attach_cached_prefix(other) == 0


def test_salts_keep_tenants_apart(manager):
    run_prefill(manager, make_request("a", list(range(9)), cache_salt="tenant-1"))
    assert manager.attach_cached_prefix(make_request("b", list(range(9)), cache_salt="tenant-2")) == 0
    assert manager.attach_cached_prefix(make_request("c", list(range(9)), cache_salt="tenant-1")) == 8


def test_prompt_logprobs_need_every_position_computed(manager):
    run_prefill(manager, make_request("a", list(range(9))))
    wants_all = make_request("b", list(range(9)), params=SamplingParams(prompt_logprobs=0))
    assert manager.attach_cached_prefix(wants_all) == 0


def test_without_prefix_caching_nothing_is_found():
    manager = KVCacheManager(9, BLOCK, enable_prefix_caching=False)
    run_prefill(manager, make_request("a", list(range(9))))
    assert manager.attach_cached_prefix(make_request("b", list(range(9)))) == 0


def test_a_fork_shares_all_and_copies_the_partly_filled_block_when_it_writes(manager):
    parent = make_request("p", list(range(6)))
    run_prefill(manager, parent)
    child = make_request("c", list(range(6)))
    assert manager.fork(parent, child, 6) == 5
    assert manager.block_ids(child) == [1, 2]
    allocation = manager.allocate_slots(child, 5, 1)
    assert allocation.copies == [(2, 3)]
    assert allocation.replaced == [(1, 3)]
    assert allocation.new_block_ids == []
    assert manager.block_ids(child) == [1, 3]
    assert manager.block_ids(parent) == [1, 2]
    # The parent owns block 2 alone again: it writes in place.
    assert manager.allocate_slots(parent, 6, 1).copies == []


def test_what_a_fork_goes_on_to_compute_is_found_as_its_own(manager):
    parent = make_request("p", list(range(6)))
    run_prefill(manager, parent)
    parent.output_token_ids += [70, 71, 72]
    manager.allocate_slots(parent, 6, 3)
    manager.cache_full_blocks(parent, 9)  # a block more than the child shares
    child = make_request("c", list(range(6)))
    manager.fork(parent, child, 6)
    child.output_token_ids += [80, 81, 82, 83, 84, 85]
    manager.allocate_slots(child, 5, 7)
    manager.cache_full_blocks(child, 12)
    tokens = [*child.all_token_ids(), 1]
    hit = make_request("hit", tokens)
    assert manager.attach_cached_prefix(hit) == 12
    assert manager.block_ids(hit)[1:] == manager.block_ids(child)[1:]
    mixed = [*parent.all_token_ids()[:8], *tokens[8:]]
    assert manager.attach_cached_prefix(make_request("mixed", mixed)) == 8, "of the parent, and no more"


def test_a_fork_under_another_salt_inherits_no_hash(manager):
    parent = make_request("p", list(range(8)))
    run_prefill(manager, parent)
    child = make_request("c", [*range(8), 9], cache_salt="another")
    manager.fork(parent, child, 8)
    child.output_token_ids += [80, 81, 82]
    manager.allocate_slots(child, 8, 4)
    manager.cache_full_blocks(child, 12)
    assert manager.attach_cached_prefix(make_request("other", [*child.all_token_ids(), 1])) == 8


def test_the_parent_copies_if_it_writes_first(manager):
    parent = make_request("p", list(range(6)))
    run_prefill(manager, parent)
    child = make_request("c", list(range(6)))
    manager.fork(parent, child, 6)
    assert manager.allocate_slots(parent, 6, 1).copies == [(2, 3)]
    assert manager.allocate_slots(child, 5, 1).copies == []


def test_a_copy_on_write_without_room_changes_nothing(manager):
    parent = make_request("p", list(range(6)))
    run_prefill(manager, parent)
    child = make_request("c", list(range(6)))
    manager.fork(parent, child, 6)
    filler = make_request("f", list(range(50, 50 + 6 * BLOCK)))
    run_prefill(manager, filler)
    assert manager.pool.num_free == 0
    assert manager.allocate_slots(child, 5, 1) is None
    assert manager.block_ids(child) == [1, 2]


def test_freeing_twice_or_an_unknown_request_is_harmless(manager):
    request = make_request("a", list(range(6)))
    run_prefill(manager, request)
    manager.free(request)
    manager.free(request)
    assert manager.pool.num_free == 8


def test_a_lost_cache_finds_nothing(manager):
    request = make_request("a", list(range(9)))
    run_prefill(manager, request)
    manager.free(request)
    manager.forget_cached()
    assert manager.attach_cached_prefix(make_request("b", list(range(9)))) == 0


def test_a_pin_holds_full_blocks_that_stay_findable(manager):
    first = make_request("a", list(range(10)))
    run_prefill(manager, first)
    manager.pin("p", first)
    manager.free(first)
    assert (manager.num_pinned, manager.pool.num_free) == (2, 6)
    run_prefill(manager, make_request("big", list(range(100, 100 + 6 * BLOCK))))  # all that is free
    again = make_request("b", list(range(10)))
    assert manager.attach_cached_prefix(again) == 8
    assert manager.block_ids(again) == [1, 2]


def test_blocks_of_two_pins_are_free_when_both_are_gone(manager):
    first, second = make_request("a", list(range(8))), make_request("b", [*range(4), 9, 9, 9, 9])
    for request, name in ((first, "p"), (second, "q")):
        run_prefill(manager, request)
        manager.pin(name, request)
        manager.free(request)
    assert manager.num_pinned == 3  # the first block is shared
    manager.unpin("p")
    assert (manager.num_pinned, manager.pool.num_free) == (2, 6)
    manager.unpin("q")
    manager.unpin("q")
    assert (manager.num_pinned, manager.pool.num_free) == (0, 8)


def test_a_pin_takes_the_older_block_of_equal_content(manager):
    first, second = make_request("a", list(range(8))), make_request("b", list(range(8)))
    for request in (first, second):  # both computed all of it at the same time
        manager.attach_cached_prefix(request)
        manager.allocate_slots(request, 0, 8)
    manager.cache_full_blocks(first, 8)
    manager.cache_full_blocks(second, 8)
    manager.pin("p", second)
    manager.free(second)
    manager.free(first)
    again = make_request("c", list(range(9)))
    assert manager.attach_cached_prefix(again) == 8
    assert manager.block_ids(again) == [1, 2]


def test_pins_go_with_the_content_of_the_blocks(manager):
    lost = []
    manager.on_pins_lost = lambda: lost.append(manager.num_pinned)
    manager.forget_cached()
    assert lost == []  # there was none
    request = make_request("a", list(range(8)))
    run_prefill(manager, request)
    manager.pin("p", request)
    manager.free(request)
    manager.forget_cached()
    assert lost == [0] and not manager.is_pinned("p")
    manager.resize(5)


def test_what_a_failed_request_computed_is_not_found_but_what_it_found_is(manager):
    run_prefill(manager, make_request("good", list(range(8))))
    bad = make_request("bad", list(range(16)))
    assert run_prefill(manager, bad) == 8
    manager.forget_computed(bad)
    manager.free(bad)
    assert manager.attach_cached_prefix(make_request("c", list(range(16)))) == 8
