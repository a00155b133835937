"""The engine's load at one moment, as metrics and status calls show it.

Reads scheduler and cache; changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from servd.scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's load at one moment."""

    state: str  # starting, ready, recovering, draining or dead
    running: int  # requests
    waiting: int  # requests
    kv_blocks_used: int  # by requests, and not pinned
    kv_blocks_pinned: int  # also while requests use them
    kv_blocks_cached: int
    kv_blocks_free: int
    num_blocks: int  # all but the null block
    block_size: int  # tokens

    @classmethod
    def read(cls, state: str, scheduler: Scheduler) -> EngineStats:
        """Queue lengths and KV use now."""
        cache = scheduler.cache
        pool, cached, pinned = cache.pool, cache.pool.num_cached, cache.num_pinned
        return cls(
            state=state,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks_used=pool.num_usable - pool.num_free - pinned,
            kv_blocks_pinned=pinned,
            kv_blocks_cached=cached,
            kv_blocks_free=pool.num_free - cached,
            num_blocks=pool.num_usable,
            block_size=cache.block_size,
        )
