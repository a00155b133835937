"""All KV blocks: who is free, who is shared, which content can be found again.

Knows nothing of requests: the manager above decides whose blocks these are.
"""

from __future__ import annotations

from collections.abc import Sequence

from servd.cache.block import FreeBlockQueue, KVCacheBlock


class BlockPool:
    """`num_blocks` blocks, of which block 0 is the null block: never handed out, a harmless target for stale entries.

    A block is *used* (ref_count > 0), *cached* (free, but findable by its hash until evicted) or *free* (plain).
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, f"a pool needs the null block and one more, got {num_blocks}"
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self.null_block = self.blocks[0]
        self.null_block.ref_count = 1
        self.free_queue = FreeBlockQueue(self.blocks[1:])
        self._by_hash: dict[bytes, KVCacheBlock] = {}
        self.num_cached = 0  # free blocks whose content can still be found

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self.free_queue)

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return len(self.blocks) - 1

    def allocate(self, count: int) -> list[KVCacheBlock]:
        """Take `count` blocks off the free list's front, evicting what they cached. The caller checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks asked of {self.num_free} free ones"
        taken = []
        for _ in range(count):
            block = self.free_queue.popleft()
            self.forget(block)
            block.ref_count = 1
            taken.append(block)
        return taken

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """One more owner for each block; a cached one leaves the free list."""
        for block in blocks:
            if block.ref_count == 0:
                self.free_queue.remove(block)
                self.num_cached -= block.block_hash is not None
            block.ref_count += 1

    def free(self, blocks: Sequence[KVCacheBlock]) -> None:
        """One owner less for each block, given in table order.

        The tail goes to the free list first, so that it is evicted before the prefix that others may share.
        """
        for block in reversed(blocks):
            assert block.ref_count > 0, f"double free of {block}"
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_queue.append(block)
                self.num_cached += block.block_hash is not None

    def lookup(self, block_hash: bytes) -> KVCacheBlock | None:
        """The block holding this content, used or cached."""
        return self._by_hash.get(block_hash)

    def register(self, block: KVCacheBlock, block_hash: bytes) -> None:
        """Make a full block findable. If equal content is findable already, the older block stays the one found."""
        assert block.ref_count > 0, f"{block} is registered but owned by nobody"
        if block.block_hash is None and block_hash not in self._by_hash:
            block.block_hash = block_hash
            self._by_hash[block_hash] = block

    def forget(self, block: KVCacheBlock) -> None:
        """This block's content can no longer be found; who holds the block keeps it."""
        if block.block_hash is not None:
            self.num_cached -= block.ref_count == 0
            del self._by_hash[block.block_hash]
            block.block_hash = None

    def forget_all(self) -> None:
        """No content can be found any more: the workers' memory is gone."""
        for block in self._by_hash.values():
            block.block_hash = None
        self._by_hash.clear()
        self.num_cached = 0

    def check_integrity(self) -> None:
        """Assert every invariant of the pool; O(num_blocks), for tests."""
        free = list(self.free_queue)
        assert len(free) == len(self.free_queue) == len({b.block_id for b in free}), "free list length or duplicate"
        free_ids = {block.block_id for block in free}
        for block in self.blocks:
            assert (block.ref_count == 0) == (block.block_id in free_ids), f"{block} free: {block.block_id in free_ids}"
        for block_hash, block in self._by_hash.items():
            assert block.block_hash == block_hash, f"{block} is filed under a hash not its own"
        hashed = sum(1 for block in self.blocks if block.block_hash is not None)
        assert hashed == len(self._by_hash), f"{hashed} blocks carry a hash, {len(self._by_hash)} are filed"
        cached = sum(1 for block in free if block.block_hash is not None)
        assert cached == self.num_cached, f"{cached} free blocks carry a hash, {self.num_cached} are counted"
        assert self.null_block.ref_count == 1 and self.null_block.block_hash is None, "the null block was handed out"
