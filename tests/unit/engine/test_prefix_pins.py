"""Pins in a crowded engine whose workers die: nothing starves, nothing leaks, and every pin comes back or is gone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from servd.engine.prefix_pins import PinQuotaError
from servd.errors import EngineUnavailableError, InvalidRequestError, RequestFailedError
from servd.sampling_params import SamplingParams
from tests.fakes import FakeEngine

GREEDY = SamplingParams(max_tokens=30, temperature=0.0)


async def answer(fake: FakeEngine, prompt: list[int], name: str) -> list[int]:
    tokens: list[int] = []
    async with fake.engine.generate(prompt, GREEDY, request_id=name) as stream:
        async for output in stream:
            assert output.error is None, output.error
            tokens += output.token_ids
    return tokens


@pytest.mark.parametrize("seed", range(4))
def test_random_pins_requests_and_deaths(tmp_path: Path, seed: int) -> None:
    """The fake worker asserts with each step that every token's KV is where the plan says."""
    choice = random.Random(seed)
    prefixes = [[choice.randrange(256) for _ in range(choice.choice([16, 40, 64]))] for _ in range(6)]

    async def one(fake: FakeEngine, number: int, expected: dict[str, list[int]]) -> None:
        prompt = choice.choice(prefixes) + [number % 256] * choice.randrange(1, 20)
        tokens = await answer(fake, prompt, f"r{number}")
        assert expected.setdefault(str(prompt), tokens) == tokens

    async def scenario() -> None:
        settings = {"max_pinned_share": 0.5, "max_tenant_pinned_share": 0.4, "max_worker_restarts": 100}
        options = {"num_blocks": 34}
        async with FakeEngine(tmp_path, settings, 256, options) as fake:
            pins, cache, expected = fake.engine.pins, fake.engine.core.scheduler.cache, {}
            for number in range(60):
                tasks = [asyncio.create_task(one(fake, 4 * number + i, expected)) for i in range(4)]
                event = choice.random()
                if event < 0.5:
                    try:
                        await pins.create(choice.choice(prefixes), tenant=choice.choice("ab"), ttl_seconds=600)
                    except PinQuotaError:
                        victim = choice.choice(pins.of_tenant("a") or pins.of_tenant("b"))
                        pins.delete(victim.id, victim.tenant)
                elif event < 0.7:
                    fake.executor.die()
                await asyncio.wait_for(asyncio.gather(*tasks), 20)
                await fake.wait_until(
                    lambda: all(pin.state == "ready" for tenant in "ab" for pin in pins.of_tenant(tenant))
                )
                cache.check_integrity()
                assert cache.num_pinned <= 16
            await fake.wait_idle()
            for tenant in "ab":
                for pin in pins.of_tenant(tenant):
                    pins.delete(pin.id, tenant)
            cache.check_integrity()
            assert cache.pool.num_free == cache.pool.num_usable

    asyncio.run(scenario())


def test_a_tenant_has_a_share_of_its_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = {"max_pinned_share": 0.3, "max_tenant_pinned_share": 0.2}
        async with FakeEngine(tmp_path, settings, 256, {"num_blocks": 101}) as fake:
            pins = fake.engine.pins
            with pytest.raises(InvalidRequestError, match="at most 335 in the 20 KV blocks"):
                await pins.create([1] * 400, tenant="a")
            await pins.create([1] * 240, tenant="a")
            with pytest.raises(PinQuotaError, match="6 KV blocks are too many beside the 15 .* allowed: 20"):
                await pins.create([2] * 96, tenant="a")
            await pins.create([2] * 240, tenant="b")
            with pytest.raises(PinQuotaError, match="1 KV blocks are too many beside the 30 .* allowed: 30"):
                await pins.create([3] * 16, tenant="c")
            assert [len(pins.of_tenant(tenant)) for tenant in "abc"] == [1, 1, 0]

    asyncio.run(scenario())


def test_a_prefix_that_cannot_be_computed_is_refused_and_holds_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with FakeEngine(tmp_path) as fake:
            step = fake.executor._step

            def failing(plan):  # type: ignore[no-untyped-def]
                output = step(plan)
                output.failed = dict.fromkeys(plan.scheduled.request_ids, "its logits are NaN")
                return output

            fake.executor._step = failing  # type: ignore[method-assign]
            with pytest.raises(RequestFailedError, match="NaN"):
                await fake.engine.pins.create([1] * 64)
            fake.executor._step = step  # type: ignore[method-assign]
            stats = fake.engine.stats()
            assert (len(fake.engine.pins), stats.kv_blocks_pinned, stats.kv_blocks_cached) == (0, 0, 0)

    asyncio.run(scenario())


def test_a_worker_with_fewer_blocks_keeps_what_fits(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = {"max_pinned_share": 0.5, "max_tenant_pinned_share": 0.5}
        async with FakeEngine(tmp_path, settings, 256, {"num_blocks": 201}) as fake:
            for token in (1, 2, 3):
                await fake.engine.pins.create([token] * 160)
            fake.executor.num_blocks = 51  # room for 25 pinned blocks
            fake.executor.die()
            pins, stats = fake.engine.pins, fake.engine.stats
            await fake.wait_until(lambda: len(pins) == 2 and stats().kv_blocks_pinned == 20)
            fake.engine.core.scheduler.cache.check_integrity()

    asyncio.run(scenario())


def test_closing_ends_prefixes_that_are_being_computed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with FakeEngine(tmp_path) as fake:
            fake.executor.gate.clear()
            task = asyncio.create_task(fake.engine.pins.create([1] * 64))
            await fake.wait_until(lambda: fake.engine.stats().running == 1)
            await fake.engine.close()
            with pytest.raises(EngineUnavailableError):
                await task

    asyncio.run(scenario())
