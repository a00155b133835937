"""One KV block's bookkeeping and the free list of blocks.

Knows nothing of requests or hashes' meaning; the list links run through the blocks themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class KVCacheBlock:
    """Book entry of one block of `block_size` token slots. Free (`ref_count` 0) blocks may still hold cached KV."""

    __slots__ = ("block_hash", "block_id", "next_free", "prev_free", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.block_hash: bytes | None = None  # set while the block is full and findable by its content
        self.prev_free: KVCacheBlock | None = None
        self.next_free: KVCacheBlock | None = None

    def __repr__(self) -> str:
        cached = "cached" if self.block_hash is not None else "plain"
        return f"KVCacheBlock({self.block_id}, refs {self.ref_count}, {cached})"


class FreeBlockQueue:
    """Doubly linked list through the blocks: O(1) pop from the front, append, and removal from the middle.

    The front is evicted first. Two sentinels spare every branch on an empty list.
    """

    def __init__(self, blocks: Iterable[KVCacheBlock]) -> None:
        self._head = KVCacheBlock(-1)
        self._tail = KVCacheBlock(-1)
        self._head.next_free = self._tail
        self._tail.prev_free = self._head
        self._length = 0
        for block in blocks:
            self.append(block)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[KVCacheBlock]:
        block = self._head.next_free
        while block is not None and block is not self._tail:
            yield block
            block = block.next_free

    def append(self, block: KVCacheBlock) -> None:
        """Add at the back: the last to be evicted."""
        last = self._tail.prev_free
        assert last is not None and block.next_free is None, f"{block} is in a free list already"
        last.next_free = block
        block.prev_free = last
        block.next_free = self._tail
        self._tail.prev_free = block
        self._length += 1

    def remove(self, block: KVCacheBlock) -> None:
        """Take a block out of the middle: a prefix hit revives it."""
        assert block.prev_free is not None and block.next_free is not None, f"{block} is not in the free list"
        block.prev_free.next_free = block.next_free
        block.next_free.prev_free = block.prev_free
        block.prev_free = block.next_free = None
        self._length -= 1

    def popleft(self) -> KVCacheBlock:
        """Take the front block: the least recently used one. The list must not be empty."""
        block = self._head.next_free
        assert block is not None and block is not self._tail, "popleft from an empty free list"
        self.remove(block)
        return block
