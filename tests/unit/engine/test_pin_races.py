"""Pins over a real cache, with a generator that the test answers for: refusals and deletions at awkward moments."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from servd.cache.kv_cache_manager import KVCacheManager
from servd.engine.prefix_pins import MAX_TRIES, PrefixPins, UnknownPrefixError
from servd.engine.result_stream import ResultStream
from servd.errors import OverloadedError, RequestFailedError
from servd.outputs import RequestOutput
from servd.request import FinishReason, Request
from servd.sampling_params import SamplingParams


class Pinning:
    """Pins whose requests the test computes, or lets go by."""

    def __init__(self) -> None:
        self.cache = KVCacheManager(20, 4)
        self.calls: list[tuple[str, ResultStream, list[int]]] = []
        self.num_refused = 0
        self.pins = PrefixPins(
            self.cache, self._generate, block_bytes=1, max_model_len=16, max_share=0.5, max_tenant_share=0.5,
            claim=lambda *_, **__: None,
        )  # fmt: skip

    def _generate(
        self, token_ids: list[int], params: SamplingParams, *, request_id: str, cache_salt: str, pin_id: str
    ) -> ResultStream:
        if self.num_refused:
            self.num_refused -= 1
            raise OverloadedError("the queue is full")
        stream = ResultStream(1, lambda: None)
        self.calls.append((pin_id, stream, token_ids))
        return stream

    async def next_call(self) -> tuple[str, ResultStream, list[int]]:
        async with asyncio.timeout(10):
            while not self.calls:
                await asyncio.sleep(0)
        return self.calls.pop()

    def compute(self, pin_id: str, token_ids: list[int]) -> None:
        """What the scheduler does with the step that ends the request."""
        request = Request("r", token_ids, SamplingParams(max_tokens=0), max_model_len=16, pin_id=pin_id)
        cached = self.cache.attach_cached_prefix(request)
        assert self.cache.allocate_slots(request, cached, len(token_ids) - cached) is not None
        self.cache.cache_full_blocks(request, len(token_ids))
        self.cache.pin(pin_id, request)
        self.cache.free(request)

    async def end(self, *, pinned: bool) -> None:
        pin_id, stream, token_ids = await self.next_call()
        if pinned:
            self.compute(pin_id, token_ids)
        stream.put(RequestOutput("r", 0, finish_reason=FinishReason.LENGTH))


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_a_prefix_whose_last_step_was_preempted_is_computed_again() -> None:
    async def scenario() -> None:
        pinning = Pinning()
        task = asyncio.create_task(pinning.pins.create([1] * 9))
        await pinning.end(pinned=False)
        await pinning.end(pinned=True)
        pin = await task
        assert pin.state == "ready" and pinning.cache.num_pinned == pin.num_blocks == 2

    run(scenario())


def test_a_prefix_that_is_preempted_each_time_is_given_up() -> None:
    async def scenario() -> None:
        pinning = Pinning()
        task = asyncio.create_task(pinning.pins.create([1] * 9))
        for _ in range(MAX_TRIES):
            await pinning.end(pinned=False)
        with pytest.raises(RequestFailedError, match="preempted"):
            await task
        assert len(pinning.pins) == 0

    run(scenario())


def test_a_prefix_that_is_deleted_in_the_step_that_ends_it_holds_nothing() -> None:
    async def scenario() -> None:
        pinning = Pinning()
        task = asyncio.create_task(pinning.pins.create([1] * 9))
        pin_id, _, token_ids = await pinning.next_call()
        pinning.pins.delete(pin_id)
        pinning.compute(pin_id, token_ids)  # before the task can hear of it
        with pytest.raises(UnknownPrefixError):
            await task
        assert pinning.cache.num_pinned == 0
        assert pinning.cache.pool.num_free == pinning.cache.pool.num_usable

    run(scenario())


def test_a_lost_prefix_comes_back_although_the_queue_is_full_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servd.engine.prefix_pins.RETRY_SECONDS", 0)

    async def scenario() -> None:
        pinning = Pinning()
        task = asyncio.create_task(pinning.pins.create([1] * 9))
        await pinning.end(pinned=True)
        pin = await task
        pinning.num_refused = 3
        pinning.cache.forget_cached()
        assert pin.state == "recomputing" and pinning.cache.num_pinned == 0
        await pinning.end(pinned=True)
        assert pin.task is not None
        await pin.task
        assert pin.state == "ready" and pinning.cache.num_pinned == 2

    run(scenario())


def test_a_new_prefix_is_refused_while_the_queue_is_full() -> None:
    async def scenario() -> None:
        pinning = Pinning()
        pinning.num_refused = 1
        with pytest.raises(OverloadedError):
            await pinning.pins.create([1] * 9)
        assert len(pinning.pins) == 0

    run(scenario())
