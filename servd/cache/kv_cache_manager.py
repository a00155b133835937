"""Each request's block table: prefix hits, growth, copy-on-write forks, release.

Knows nothing of the order of requests or of budgets: "no room" is an answer (None), and the scheduler decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from servd.cache.block import KVCacheBlock
from servd.cache.block_pool import BlockPool
from servd.cache.prefix_hash import block_hash, root_hash
from servd.request import Request


@dataclass(slots=True)
class Allocation:
    """What `allocate_slots` changed in a request's table."""

    new_block_ids: list[int] = field(default_factory=list)
    replaced: list[tuple[int, int]] = field(default_factory=list)  # (index in the table, new block)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source block, destination block)


class _Table:
    """The blocks of one request, in token order; the first `num_hashed` of them were offered to the prefix cache.

    The first `num_attached` were found there, not computed by the request.
    """

    __slots__ = ("blocks", "last_hash", "num_attached", "num_hashed")

    def __init__(self, root: bytes) -> None:
        self.blocks: list[KVCacheBlock] = []
        self.num_attached = 0
        self.num_hashed = 0
        self.last_hash = root


class KVCacheManager:
    """Block tables of all running requests over one pool."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks)
        self._tables: dict[str, _Table] = {}
        self._pins: dict[str, list[KVCacheBlock]] = {}
        self._pin_counts: Counter[KVCacheBlock] = Counter()  # pins of each pinned block
        self.on_pins_lost: Callable[[], None] | None = None  # told when the content of pinned blocks is lost
        self.prefix_queries = 0  # tokens of admitted requests
        self.prefix_hits = 0  # of these, found in blocks of the cache or of a fork's parent

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def block_ids(self, request: Request) -> list[int]:
        """The request's table as ids."""
        return [block.block_id for block in self._tables[request.request_id].blocks]

    def attach_cached_prefix(self, request: Request) -> int:
        """Give a request without blocks those that hold its longest cached prefix; returns the tokens they cover.

        At most num_tokens − 1, so that the last token is computed and gives logits; none if the prompt's
        log-probabilities, or a mean over it, are wanted, since those need every position computed.
        """
        assert request.request_id not in self._tables, f"{request} holds blocks already"
        table = _Table(root_hash(request.cache_salt))
        self._tables[request.request_id] = table
        if not self.enable_prefix_caching or request.sampling_params.needs_every_position:
            return 0
        token_ids = request.all_token_ids()
        size = self.block_size
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            content = block_hash(table.last_hash, token_ids[start : start + size])
            block = self.pool.lookup(content)
            if block is None:
                break
            self.pool.touch([block])
            table.blocks.append(block)
            table.last_hash = content
        table.num_attached = table.num_hashed = len(table.blocks)
        return table.num_hashed * size

    def count_prefix_lookup(self, num_tokens: int, num_cached_tokens: int) -> None:
        """Count a look-up that led to an admission (a request that finds no room looks up again and again)."""
        self.prefix_queries += num_tokens
        self.prefix_hits += num_cached_tokens

    def allocate_slots(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *, num_kept_free: int = 0
    ) -> Allocation | None:
        """Room for tokens [num_computed, num_computed + num_new) in blocks that are the request's alone.

        A block of that range that others share is replaced by a copy. Returns None, with nothing changed, if the
        pool cannot give enough blocks and keep `num_kept_free`.
        """
        table = self._tables[request.request_id]
        first = num_computed_tokens // self.block_size
        shared = [i for i in range(first, len(table.blocks)) if table.blocks[i].ref_count > 1]
        num_new = max(self.num_blocks_for(num_computed_tokens + num_new_tokens) - len(table.blocks), 0)
        if len(shared) + num_new > self.pool.num_free - num_kept_free:
            return None
        allocation = Allocation()
        for index, fresh in zip(shared, self.pool.allocate(len(shared)), strict=True):
            old = table.blocks[index]
            self.pool.free([old])
            table.blocks[index] = fresh
            allocation.replaced.append((index, fresh.block_id))
            allocation.copies.append((old.block_id, fresh.block_id))
        added = self.pool.allocate(num_new)
        table.blocks.extend(added)
        allocation.new_block_ids = [block.block_id for block in added]
        return allocation

    def cache_full_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Offer the request's blocks that are full of known, computed tokens to the prefix cache."""
        if not self.enable_prefix_caching:
            return
        table = self._tables[request.request_id]
        num_full = min(num_computed_tokens, request.num_tokens) // self.block_size
        if num_full <= table.num_hashed:
            return
        start = table.num_hashed * self.block_size
        token_ids = request.all_token_ids()[start : num_full * self.block_size]
        for index in range(table.num_hashed, num_full):
            offset = (index - table.num_hashed) * self.block_size
            table.last_hash = block_hash(table.last_hash, token_ids[offset : offset + self.block_size])
            self.pool.register(table.blocks[index], table.last_hash)
        table.num_hashed = num_full

    def fork(self, parent: Request, child: Request, num_tokens: int) -> int:
        """Let `child`, which has no blocks, share the parent's first `num_tokens`, a partly filled block included.

        Returns the tokens the child need not compute: these, but for its own last token, which must be computed for
        its logits. It is written into a copy of a block that is still shared when the child's first `allocate_slots`
        comes. What of the parent's blocks the prefix cache knows need not be hashed again.
        """
        assert child.request_id not in self._tables, f"{child} holds blocks already"
        source = self._tables[parent.request_id]
        table = _Table(root_hash(child.cache_salt))
        table.blocks = source.blocks[: self.num_blocks_for(num_tokens)]
        if source.num_hashed * self.block_size <= num_tokens and parent.cache_salt == child.cache_salt:
            table.num_hashed, table.last_hash = source.num_hashed, source.last_hash
        self.pool.touch(table.blocks)
        self._tables[child.request_id] = table
        return min(num_tokens, child.num_tokens - 1)

    def holds_blocks(self, request: Request) -> bool:
        """Whether the request has a table."""
        return request.request_id in self._tables

    @property
    def num_pinned(self) -> int:
        """Blocks that pins hold, whether requests use them or not."""
        return len(self._pin_counts)

    def is_pinned(self, pin_id: str) -> bool:
        """Whether blocks are held under this name."""
        return pin_id in self._pins

    def pin(self, pin_id: str, request: Request) -> None:
        """Hold the full blocks of a request whose tokens are all computed, findable, until `unpin`."""
        assert pin_id not in self._pins, f"{pin_id} is pinned already"
        token_ids, size = request.all_token_ids(), self.block_size
        table = self._tables[request.request_id]
        content, pinned = root_hash(request.cache_salt), []
        for index in range(len(token_ids) // size):
            content = block_hash(content, token_ids[index * size : (index + 1) * size])
            # Equal content may be findable in another's block, or no longer be findable at all.
            self.pool.register(table.blocks[index], content)
            block = self.pool.lookup(content)
            assert block is not None, f"block {index} of {request} cannot be found"
            pinned.append(block)
        self.pool.touch(pinned)
        self._pins[pin_id] = pinned
        self._pin_counts.update(pinned)

    def unpin(self, pin_id: str) -> None:
        """Let go of a pin's blocks, which stay findable until evicted. Unknown pins are ignored."""
        pinned = self._pins.pop(pin_id, [])
        self._pin_counts -= Counter(pinned)
        self.pool.free(pinned)

    def forget_computed(self, request: Request) -> None:
        """What the request computed is not to be trusted: others must not find it. (What it found itself stays.)"""
        table = self._tables.get(request.request_id)
        if table is not None:
            for block in table.blocks[table.num_attached : table.num_hashed]:
                if block not in self._pin_counts:
                    self.pool.forget(block)

    def free(self, request: Request) -> None:
        """Release the request's blocks; cached content stays findable until evicted. Unknown requests are ignored."""
        table = self._tables.pop(request.request_id, None)
        if table is not None:
            self.pool.free(table.blocks)

    def forget_cached(self) -> None:
        """The content of all blocks is lost (new workers): nothing may be found any more."""
        assert not self._tables, f"{len(self._tables)} requests still hold blocks"
        had_pins = bool(self._pins)
        for pin_id in list(self._pins):
            self.unpin(pin_id)
        self.pool.forget_all()
        if had_pins and self.on_pins_lost is not None:
            self.on_pins_lost()

    def resize(self, num_blocks: int) -> None:
        """New workers have so many blocks: a GPU's free memory is not the same at each start."""
        assert not self._tables, f"{len(self._tables)} requests still hold blocks"
        assert not self._pins, f"{len(self._pins)} pins still hold blocks"
        self.pool = BlockPool(num_blocks)

    def check_integrity(self) -> None:
        """Assert that tables and reference counts agree; for tests."""
        self.pool.check_integrity()
        owners: dict[int, int] = {}
        for request_id, table in self._tables.items():
            ids = [block.block_id for block in table.blocks]
            assert len(ids) == len(set(ids)), f"{request_id} holds a block twice: {ids}"
            assert 0 not in ids, f"{request_id} holds the null block"
            for block_id in ids:
                owners[block_id] = owners.get(block_id, 0) + 1
        counts: Counter[KVCacheBlock] = Counter()
        for pin_id, pinned in self._pins.items():
            counts.update(pinned)
            for block in pinned:
                owners[block.block_id] = owners.get(block.block_id, 0) + 1
                found = block.block_hash is not None and self.pool.lookup(block.block_hash)
                assert found is block, f"{pin_id} holds {block}, which cannot be found"
        assert counts == self._pin_counts, f"{self._pin_counts} are counted, {counts} are pinned"
        for block in self.pool.blocks[1:]:
            num_owners = owners.get(block.block_id, 0)
            assert block.ref_count == num_owners, f"{block} has {num_owners} owners"
