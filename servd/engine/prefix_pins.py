"""Prefixes that stay in the KV cache until they expire: who pinned them, for how long, and within which share of it.

Owns the pins' life. The blocks are computed by ordinary prompt-only requests; the cache holds them. Knows no texts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from servd.cache.kv_cache_manager import KVCacheManager
from servd.engine.result_stream import ResultStream
from servd.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestFailedError,
    ServdError,
    UnsupportedError,
)
from servd.sampling_params import SamplingParams

logger = logging.getLogger("servd.engine")

DEFAULT_TTL_SECONDS = 3600.0
MIN_TTL_SECONDS, MAX_TTL_SECONDS = 1.0, 7 * 24 * 3600.0
MAX_NAME_CHARS = 256
RETRY_SECONDS = 0.5  # between tries to queue a lost prefix again
MAX_TRIES = 8  # a prefix that is preempted in the very step that ends it is computed again


class UnknownPrefixError(NotFoundError):
    """No such pin: never made, expired, deleted, or another tenant's."""

    code = "prefix_not_found"


class PinQuotaError(OverloadedError):
    """The pins of the server, or of the tenant, leave no room for this one until some expire or are deleted."""

    code = "pin_quota_exceeded"


class Generate(Protocol):
    """AsyncEngine.generate, as far as it is used here."""

    def __call__(
        self, prompt_token_ids: list[int], params: SamplingParams, *, request_id: str, cache_salt: str, pin_id: str
    ) -> ResultStream:
        """Queue a request whose blocks are pinned under `pin_id` when it ends."""


@dataclass(slots=True)
class PrefixPin:
    """A pinned prefix. Only full blocks are held: the first `num_blocks` * block_size tokens."""

    id: str
    tenant: str
    token_ids: list[int]
    cache_salt: str  # the tenant's part included
    name: str | None
    num_blocks: int
    num_bytes: int
    created_at: float  # Unix seconds
    expires_at: float
    state: Literal["computing", "ready", "recomputing"] = "computing"
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix as it was given."""
        return len(self.token_ids)


class PrefixPins:
    """All pins of an engine; called on its event loop."""

    def __init__(
        self,
        cache: KVCacheManager,
        generate: Generate,
        *,
        block_bytes: int,
        max_model_len: int,
        max_share: float,
        max_tenant_share: float,
        claim: Callable[..., None],
    ) -> None:
        """The shares are of all blocks; whatever they say, a request of `max_model_len` tokens always finds room.

        `claim`: RequestLog.claim, so that the requests made here belong to the pins' tenants.
        """
        self._cache = cache
        self._generate = generate
        self._claim = claim
        self._block_bytes = block_bytes
        self._max_model_len = max_model_len
        self._max_share = max_share
        self._max_tenant_share = max_tenant_share
        self._pins: dict[str, PrefixPin] = {}
        cache.on_pins_lost = self._recompute_all

    def __len__(self) -> int:
        return len(self._pins)

    async def create(
        self,
        token_ids: list[int],
        *,
        tenant: str = "",
        cache_salt: str = "",
        ttl_seconds: float = DEFAULT_TTL_SECONDS,
        name: str | None = None,
        prompt_param: str = "prompt",
    ) -> PrefixPin:
        """Compute a prefix and pin it; the same one again (of the same tenant and salt) lives on from now.

        A caller that is cancelled meanwhile leaves the pin to itself. Raises InvalidRequestError, PinQuotaError, and
        what computing a prompt may raise.
        """
        if not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
            raise InvalidRequestError(
                f"ttl_seconds is {ttl_seconds:g}; allowed: {MIN_TTL_SECONDS:g} to {MAX_TTL_SECONDS:g}",
                param="ttl_seconds",
            )
        if name is not None and len(name) > MAX_NAME_CHARS:
            raise InvalidRequestError(f"name has {len(name)} characters; allowed: {MAX_NAME_CHARS}", param="name")
        pin = next(
            (p for p in self.of_tenant(tenant) if p.token_ids == token_ids and p.cache_salt == cache_salt), None
        )
        if pin is None:
            pin = self._new_pin(token_ids, tenant, cache_salt, prompt_param)
        pin.name = pin.name if name is None else name
        self._expire_in(pin, ttl_seconds)
        task = pin.task
        if task is not None:
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                if task.cancelled():
                    raise UnknownPrefixError("the prefix was deleted while it was computed", param="id") from None
                raise
        return pin

    def of_tenant(self, tenant: str = "") -> list[PrefixPin]:
        """The tenant's pins, oldest first."""
        return [pin for pin in self._pins.values() if pin.tenant == tenant]

    def get(self, pin_id: str, tenant: str = "") -> PrefixPin:
        """The pin of that id. Raises UnknownPrefixError, also for another tenant's."""
        pin = self._pins.get(pin_id)
        if pin is None or pin.tenant != tenant:
            raise UnknownPrefixError(f"prefix {pin_id[:100]!r} does not exist, or has expired", param="id")
        return pin

    def delete(self, pin_id: str, tenant: str = "") -> None:
        """Let go of a pin; running requests keep the blocks that they use. Raises UnknownPrefixError."""
        self._drop(self.get(pin_id, tenant))

    def close(self) -> None:
        """Let go of all."""
        for pin in list(self._pins.values()):
            self._drop(pin)

    # -- quota -----------------------------------------------------------------------------------------------------

    def _limit(self, share: float) -> int:
        """Blocks that may be pinned: the share, but never what one request of the full context may need."""
        usable = self._cache.pool.num_usable
        return max(min(int(share * usable), usable - self._cache.num_blocks_for(self._max_model_len)), 0)

    def _new_pin(self, token_ids: list[int], tenant: str, cache_salt: str, param: str) -> PrefixPin:
        size = self._cache.block_size
        num_blocks = len(token_ids) // size
        if not self._cache.enable_prefix_caching:
            raise UnsupportedError("prefixes cannot be pinned: this server runs with --no-enable-prefix-caching")
        if num_blocks == 0:
            raise InvalidRequestError(
                f"{param} has {len(token_ids)} tokens; allowed: at least {size}, since whole KV blocks are pinned",
                param=param,
            )
        everyone = list(self._pins.values())
        for share, of in ((self._max_tenant_share, self.of_tenant(tenant)), (self._max_share, everyone)):
            limit, pinned = self._limit(share), sum(pin.num_blocks for pin in of)
            if num_blocks > limit:
                raise InvalidRequestError(
                    f"{param} has {len(token_ids)} tokens; allowed: at most {(limit + 1) * size - 1} in the "
                    f"{limit} KV blocks that may be pinned",
                    param=param,
                )
            if pinned + num_blocks > limit:
                soonest = min(pin.expires_at for pin in of) - time.time()
                raise PinQuotaError(
                    f"{num_blocks} KV blocks are too many beside the {pinned} that are pinned; allowed: {limit}; "
                    "delete a prefix, or wait until one expires",
                    retry_after=max(soonest, 1.0),
                )
        now = time.time()
        pin = PrefixPin(
            f"prefix-{uuid.uuid4().hex}", tenant, token_ids, cache_salt, None, num_blocks,
            num_blocks * self._block_bytes, now, math.inf,
        )  # fmt: skip
        self._pins[pin.id] = pin
        self._start(pin)
        return pin

    # -- the pins' life --------------------------------------------------------------------------------------------

    def _expire_in(self, pin: PrefixPin, seconds: float) -> None:
        if pin.timer is not None:
            pin.timer.cancel()
        pin.expires_at = time.time() + seconds
        pin.timer = asyncio.get_running_loop().call_later(seconds, self._drop, pin)

    def _drop(self, pin: PrefixPin) -> None:
        self._pins.pop(pin.id, None)
        self._cache.unpin(pin.id)
        if pin.timer is not None:
            pin.timer.cancel()
        if pin.task is not None:
            pin.task.cancel()

    async def _compute(self, pin: PrefixPin) -> None:
        """Compute the pin's blocks until they are held; lets go of it if that fails. Raises why."""
        try:
            for number in range(MAX_TRIES):
                await self._run_request(pin, number)
                if self._cache.is_pinned(pin.id):
                    break
            else:
                raise RequestFailedError("the prefix was preempted each time it was computed")
            if sum(p.num_blocks for p in self._pins.values()) > self._limit(self._max_share):
                raise RequestFailedError("the new workers have fewer KV blocks")
            pin.state = "ready"
        except ServdError as error:
            if pin.state == "recomputing":
                logger.warning("prefix %s is no longer pinned: %s", pin.id, error.message)
            pin.task = None
            self._drop(pin)
            raise
        finally:
            pin.task = None
            if pin.id not in self._pins:  # deleted meanwhile, perhaps after the step that pinned it
                self._cache.unpin(pin.id)

    async def _run_request(self, pin: PrefixPin, number: int) -> None:
        token_ids = pin.token_ids[: pin.num_blocks * self._cache.block_size]
        request_id = f"{pin.id}-{number}"
        while True:
            try:
                stream = self._generate(
                    token_ids, SamplingParams(max_tokens=0), request_id=request_id, cache_salt=pin.cache_salt,
                    pin_id=pin.id,
                )  # fmt: skip
                break
            except OverloadedError:
                if pin.state != "recomputing":
                    raise
                await asyncio.sleep(RETRY_SECONDS)
        self._claim(request_id, tenant=pin.tenant)
        async with stream:
            async for output in stream:
                if output.error is not None:
                    raise output.error

    def _start(self, pin: PrefixPin) -> None:
        pin.task = asyncio.create_task(self._compute(pin))
        pin.task.add_done_callback(_see)

    def _recompute_all(self) -> None:
        """The blocks are lost. Pins that are being computed find out by themselves."""
        for pin in self._pins.values():
            if pin.task is None:
                pin.state = "recomputing"
                self._start(pin)


def _see(task: asyncio.Task[None]) -> None:
    """Whoever waits for the task hears of its failure; if nobody does, asyncio need not report it."""
    if not task.cancelled():
        task.exception()
