"""Both executors with a real, tiny Llama: the same tokens from a process, from a thread, and after a kill."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from servd.config import EngineConfig
from servd.errors import ConfigError, StepFailedError, WorkerDied
from servd.executor.base import EXECUTORS, Executor
from servd.executor.inproc import InprocExecutor
from servd.executor.multiproc import MultiprocExecutor
from servd.hub import ModelFiles
from servd.outputs import NewRequestData, ScheduledRequests, SchedulerOutput
from servd.sampling_params import SamplingParams
from tests.unit.worker.tiny_llama import write_tiny_llama


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def make_executor(name: str, files: ModelFiles, **settings: object) -> Executor:
    config = EngineConfig.from_flat(device="cpu", max_num_seqs=4, threads=1, **settings).resolve()
    return EXECUTORS.get(name)(config, files)


async def generate(executor: Executor, num_tokens: int = 5) -> list[int]:
    """One request, all steps submitted before the first one's token is known."""
    params = SamplingParams(temperature=0.8, logit_bias={5: -1.5}, stop=("x",), logprobs=1)
    new = NewRequestData("r", [3, 1, 4, 1, 5], 5, params, 2**64 - 3, [0], [1], 10**6)
    plans = [SchedulerOutput(0, [new], ScheduledRequests(["r"], [0], [5], [[]], [True]), [], [], [])]
    for step in range(1, num_tokens):
        scheduled = ScheduledRequests(["r"], [4 + step], [1], [[]], [True])
        plans.append(SchedulerOutput(step, [], scheduled, [], [], []))
    outputs = await asyncio.gather(*map(executor.submit, plans))
    assert all(output.logprobs["r"][0].token_id == output.sampled_token_ids[0] for output in outputs)
    return [output.sampled_token_ids[0] for output in outputs]


def test_a_process_gives_what_a_thread_gives_and_again_after_a_kill(files: ModelFiles) -> None:
    async def scenario() -> None:
        results = []
        seen: list[tuple[str, int, int]] = []
        for name in ("inproc", "multiproc"):
            executor = make_executor(name, files)
            info = await executor.start(lambda *news: seen.append(news))
            assert info.device == "cpu" and info.num_blocks == 4 * 8 + 1
            assert seen and seen[-1][1] == seen.pop()[2]
            results.append(await generate(executor))
            if isinstance(executor, MultiprocExecutor):
                os.kill(executor.pids[0], signal.SIGKILL)
                with pytest.raises(WorkerDied):
                    await executor.submit(SchedulerOutput(9, [], ScheduledRequests([], [], [], [], []), [], [], []))
                await executor.start()
                results.append(await generate(executor))
            await executor.close()
        assert results[0] == results[1] == results[2]

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["inproc", "multiproc"])
def test_a_wrong_flag_is_told_in_the_workers_words(name: str, files: ModelFiles) -> None:
    async def scenario() -> None:
        executor = make_executor(name, files, max_model_len=1000)
        with pytest.raises(ConfigError, match=r"^--max-model-len is 1000; allowed: at most the model's 128$"):
            await executor.start()
        await executor.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["inproc", "multiproc"])
def test_a_broken_checkpoint_does_not_start(name: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        executor = make_executor(name, ModelFiles("gone", tmp_path, (tmp_path / "gone.safetensors",)))
        with pytest.raises((ConfigError, WorkerDied)):
            await executor.start()
        await executor.close()

    asyncio.run(scenario())


def test_inproc_reports_a_step_that_raised_and_goes_on(files: ModelFiles) -> None:
    async def scenario() -> None:
        executor = make_executor("inproc", files)
        assert isinstance(executor, InprocExecutor)
        await executor.start()
        lost_block = SchedulerOutput(0, [], ScheduledRequests([], [], [], [], []), [], [(1, 10**6)], [])
        with pytest.raises(StepFailedError, match="step 0"):
            await executor.submit(lost_block)
        assert len(await generate(executor)) == 5
        await executor.close()
        with pytest.raises(WorkerDied):
            await executor.submit(lost_block)

    asyncio.run(scenario())
