"""Exact block ids and eviction order of the pool."""

from servd.cache.block_pool import BlockPool


def ids(blocks) -> list[int]:
    return [block.block_id for block in blocks]


def test_blocks_are_handed_out_in_order_and_never_the_null_block():
    pool = BlockPool(5)
    assert ids(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check_integrity()


def test_a_freed_table_is_evicted_from_its_tail():
    pool = BlockPool(6)
    table = pool.allocate(3)
    pool.free(table)
    # The two never used come first, then the freed ones, the table's tail before its head.
    assert ids(pool.allocate(5)) == [4, 5, 3, 2, 1]


def test_a_cached_block_is_found_until_it_is_allocated_again():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.register(block, b"content")
    pool.free([block])
    assert pool.lookup(b"content") is block
    assert pool.num_cached == 1
    pool.allocate(2)
    assert pool.lookup(b"content") is None
    assert pool.num_cached == 0
    pool.check_integrity()


def test_touching_a_cached_block_takes_it_from_the_middle_of_the_free_list():
    pool = BlockPool(5)
    table = pool.allocate(3)
    pool.register(table[1], b"middle")
    pool.free(table)
    pool.touch([table[1]])
    assert ids(pool.free_queue) == [4, 3, 1]
    pool.check_integrity()


def test_a_shared_block_is_free_only_when_its_last_owner_lets_go():
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.touch(blocks)
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(blocks)
    assert pool.num_free == 2


def test_equal_content_keeps_the_block_that_was_found_first():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.lookup(b"same") is first
    pool.check_integrity()
