"""The engine over the real worker and a tiny Llama: steps that fail and workers that are killed change no token."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

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


@asynccontextmanager
async def running(files: ModelFiles, executor: str, **options: int) -> AsyncIterator[AsyncEngine]:
    engine = make_engine(files, executor, **options)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


def kill_worker(engine: AsyncEngine) -> int:
    """Returns the id of the process that it was."""
    assert isinstance(engine.executor, MultiprocExecutor)
    (pid,) = engine.executor.pids
    os.kill(pid, signal.SIGKILL)
    return pid


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


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def until_running(engine: AsyncEngine) -> None:
    await until(lambda: len(engine.core.step_log) > 0 and engine.stats().running >= 2)


@pytest.fixture(scope="module")
def expected(files: ModelFiles) -> list[dict[int, list[int]]]:
    async def scenario() -> list[dict[int, list[int]]]:
        async with running(files, "inproc", num_speculative_tokens=0) as engine:
            return [await answers(engine, prompt, "alone") for prompt in PROMPTS]

    return asyncio.run(scenario())


def test_a_step_that_fails_with_another_planned_behind_it_changes_no_token(
    files: ModelFiles, expected: list[dict[int, list[int]]]
) -> None:
    async def scenario() -> None:
        async with running(files, "inproc") as engine:
            assert isinstance(engine.executor, InprocExecutor) and engine.executor._worker is not None
            runner = engine.executor._worker.runner
            forward, calls = runner.model.forward, 0

            def forward_or_fail(*args):  # type: ignore[no-untyped-def]
                nonlocal calls
                calls += 1
                if calls in (2, 9, 30):  # while prompts are chunked, soon after, and deep in the answers
                    raise RuntimeError("out of memory")
                return forward(*args)

            runner.model.forward = forward_or_fail  # type: ignore[method-assign]
            assert await all_answers(engine) == expected
            assert calls > 30
            assert sum(step.num_accepted_tokens for step in engine.core.step_log) > 0
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
            await answers(engine, [1], "last", max_tokens=1)
            # The worker forgot all but the last ones.
            assert runner.batch.num_requests <= 2 and not runner.batch.failed

    asyncio.run(scenario())


def test_workers_killed_in_a_step_and_while_they_start_change_no_token(
    files: ModelFiles, expected: list[dict[int, list[int]]]
) -> None:
    async def scenario() -> None:
        async with running(files, "multiproc") as engine:
            executor = engine.executor
            assert isinstance(executor, MultiprocExecutor)
            tasks = asyncio.create_task(all_answers(engine))
            await until_running(engine)
            first = kill_worker(engine)
            await until(lambda: executor.pids not in ([], [first]))
            kill_worker(engine)  # it imports torch now
            assert await asyncio.wait_for(tasks, 120) == expected
            assert engine.state == "ready"

    asyncio.run(scenario())


def test_a_worker_that_dies_while_draining_is_replaced_and_the_answers_end(
    files: ModelFiles, expected: list[dict[int, list[int]]]
) -> None:
    async def scenario() -> None:
        async with running(files, "multiproc") as engine:
            tasks = asyncio.create_task(all_answers(engine))
            await until_running(engine)
            draining = asyncio.create_task(engine.drain(60))
            kill_worker(engine)
            assert await asyncio.wait_for(tasks, 120) == expected
            await draining
            assert engine.state == "draining"

    asyncio.run(scenario())


def test_closing_while_the_worker_is_replaced_ends_every_request(files: ModelFiles) -> None:
    async def scenario() -> None:
        async with running(files, "multiproc") as engine:
            task = asyncio.create_task(answers(engine, PROMPTS[0], "r", max_tokens=100))
            await until_running(engine)
            kill_worker(engine)
            await until(lambda: engine.state == "recovering")
            await asyncio.wait_for(asyncio.gather(engine.close(), engine.close()), 60)
            with pytest.raises(EngineUnavailableError):
                await task
            assert isinstance(engine.executor, MultiprocExecutor) and engine.executor.pids == []

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
        async with running(files, "multiproc") as engine:
            stream = engine.generate([1, 2], SamplingParams(max_tokens=100, ignore_eos=True), request_id="r")
            await anext(stream)
            kill_worker(engine)
            await until(lambda: engine.state == "recovering")
            assert engine.abort("r")
            last = [output async for output in stream][-1]
            assert last.finish_reason is FinishReason.ABORT
            # The name is free, the engine works.
            assert len((await answers(engine, [1, 2], "r", max_tokens=5))[0]) == 5

    asyncio.run(scenario())
