"""The engine over the real worker and a tiny Llama: steps that fail and workers that are killed change no token."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from servd.config import EngineConfig
from servd.engine.async_engine import AsyncEngine
from servd.errors import EngineUnavailableError
from servd.executor.inproc import InprocExecutor
from servd.executor.multiproc import MultiprocExecutor
from servd.hub import ModelFiles
from servd.request import FinishReason
from servd.sampling_params import SamplingParams
from tests.fakes import ByteTokenizer
from tests.unit.worker.tiny_llama import write_tiny_llama


class SomeBytes(ByteTokenizer):
    """The tiny model's vocabulary is larger than the tokenizer's, as with many real models."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id % 128])


PROMPTS = [[3, 1, 4, 1, 5], list(range(1, 40)), [9, 2, 6] * 7, [7] * 16]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def make_engine(files: ModelFiles, executor: str, **options: int) -> AsyncEngine:
    settings = options | {"max_num_seqs": 6, "max_num_batched_tokens": 24, "block_size": 8, "threads": 1}
    # Without recordings, every step calls the model's forward, where a test can make it fail.
    config = EngineConfig.from_flat(device="cpu", executor=executor, replay_steps=executor != "inproc", **settings)
    return AsyncEngine(config, files, SomeBytes())  # type: ignore[arg-type]


async def answers(engine: AsyncEngine, prompt: list[int], name: str, max_tokens: int = 40) -> dict[int, list[int]]:
    temperature = 0.9 if len(prompt) % 2 else 0.2  # cold enough to repeat itself: guesses are right now and then
    params = SamplingParams(n=2, temperature=temperature, seed=11, max_tokens=max_tokens, ignore_eos=True)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    async with engine.generate(prompt, params, request_id=name) as stream:
        async for output in stream:
            if output.error is not None:
                raise output.error
            tokens[output.index] += output.token_ids
    return tokens


async def all_answers(engine: AsyncEngine) -> list[dict[int, list[int]]]:
    return await asyncio.gather(*(answers(engine, prompt, f"r{i}") for i, prompt in enumerate(PROMPTS)))


async def until_running(engine: AsyncEngine) -> None:
    async with asyncio.timeout(60):
        while not engine.core.step_log or engine.stats().running < 2:
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def expected(files: ModelFiles) -> list[dict[int, list[int]]]:
    async def scenario() -> list[dict[int, list[int]]]:
        engine = make_engine(files, "inproc", num_speculative_tokens=0)
        await engine.start()
        try:
            return [await answers(engine, prompt, "alone") for prompt in PROMPTS]
        finally:
            await engine.close()

    return asyncio.run(scenario())


def test_a_step_that_fails_with_another_planned_behind_it_changes_no_token(
    files: ModelFiles, expected: list[dict[int, list[int]]]
) -> None:
    async def scenario() -> None:
        engine = make_engine(files, "inproc")
        await engine.start()
        assert isinstance(engine.executor, InprocExecutor) and engine.executor._worker is not None
        model = engine.executor._worker.runner.model
        forward, calls = model.forward, 0

        def forward_or_fail(*args):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls in (2, 9, 30):  # while prompts are chunked, soon after, and deep in the answers
                raise RuntimeError("out of memory")
            return forward(*args)

        model.forward = forward_or_fail  # type: ignore[method-assign]
        assert await all_answers(engine) == expected
        assert calls > 30
        assert sum(step.num_accepted_tokens for step in engine.core.step_log) > 0
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        batch = engine.executor._worker.runner.batch
        await answers(engine, [1], "last", max_tokens=1)
        assert batch.num_requests <= 2 and not batch.failed  # the worker forgot all but the last ones
        await engine.close()

    asyncio.run(scenario())


def test_workers_killed_in_a_step_and_while_they_start_change_no_token(
    files: ModelFiles, expected: list[dict[int, list[int]]]
) -> None:
    async def scenario() -> None:
        engine = make_engine(files, "multiproc")
        await engine.start()
        assert isinstance(engine.executor, MultiprocExecutor)
        tasks = asyncio.create_task(all_answers(engine))
        await until_running(engine)
        (first,) = engine.executor.pids
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(60):
            while engine.executor.pids in ([], [first]):
                await asyncio.sleep(0.001)
        os.kill(engine.executor.pids[0], signal.SIGKILL)  # it imports torch now
        assert await asyncio.wait_for(tasks, 120) == expected
        assert engine.state == "ready"
        await engine.close()

    asyncio.run(scenario())


def test_a_worker_that_dies_while_draining_is_replaced_and_the_answers_end(
    files: ModelFiles, expected: list[dict[int, list[int]]]
) -> None:
    async def scenario() -> None:
        engine = make_engine(files, "multiproc")
        await engine.start()
        assert isinstance(engine.executor, MultiprocExecutor)
        tasks = asyncio.create_task(all_answers(engine))
        await until_running(engine)
        draining = asyncio.create_task(engine.drain(60))
        os.kill(engine.executor.pids[0], signal.SIGKILL)
        assert await asyncio.wait_for(tasks, 120) == expected
        await draining
        assert engine.state == "draining"
        await engine.close()

    asyncio.run(scenario())


def test_closing_while_the_worker_is_replaced_ends_every_request(files: ModelFiles) -> None:
    async def scenario() -> None:
        engine = make_engine(files, "multiproc")
        await engine.start()
        assert isinstance(engine.executor, MultiprocExecutor)
        task = asyncio.create_task(answers(engine, PROMPTS[0], "r", max_tokens=100))
        await until_running(engine)
        os.kill(engine.executor.pids[0], signal.SIGKILL)
        async with asyncio.timeout(60):
            while engine.state != "recovering":
                await asyncio.sleep(0.001)
        await asyncio.wait_for(asyncio.gather(engine.close(), engine.close()), 60)
        with pytest.raises(EngineUnavailableError):
            await task
        assert engine.executor.pids == []

    asyncio.run(scenario())


def test_closing_an_inproc_engine_while_it_loads_leaves_no_worker(files: ModelFiles) -> None:
    async def scenario() -> None:
        engine = make_engine(files, "inproc")
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineUnavailableError):
            await start
        assert engine.state == "dead"

    asyncio.run(scenario())


def test_aborts_while_workers_are_replaced_are_final(files: ModelFiles) -> None:
    async def scenario() -> None:
        engine = make_engine(files, "multiproc")
        await engine.start()
        assert isinstance(engine.executor, MultiprocExecutor)
        stream = engine.generate([1, 2], SamplingParams(max_tokens=100, ignore_eos=True), request_id="r")
        await anext(stream)
        os.kill(engine.executor.pids[0], signal.SIGKILL)
        async with asyncio.timeout(60):
            while engine.state != "recovering":
                await asyncio.sleep(0.001)
        assert engine.abort("r")
        last = [output async for output in stream][-1]
        assert last.finish_reason is FinishReason.ABORT
        assert len((await answers(engine, [1, 2], "r", max_tokens=5))[0]) == 5  # the name is free, the engine works
        await engine.close()

    asyncio.run(scenario())
