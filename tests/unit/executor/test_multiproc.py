"""The multiproc executor against real processes: order, start-up errors, every kind of death, restart, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from servd.config import EngineConfig
from servd.errors import ConfigError, StepFailedError, WorkerDied
from servd.executor.multiproc import MultiprocExecutor
from servd.hub import ModelFiles
from servd.outputs import ScheduledRequests, SchedulerOutput

SOON = 2.0  # seconds; a death must be known long before a human loses patience


class EchoExecutor(MultiprocExecutor):
    worker_module = "tests.unit.executor.echo_worker"


def make_executor(name: str = "echo") -> EchoExecutor:
    return EchoExecutor(EngineConfig.from_flat(block_size=32).resolve(), ModelFiles(name, Path("/"), ()))


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[EchoExecutor]:
    executor = make_executor()
    await executor.start()
    try:
        yield executor
    finally:
        await executor.close()


def make_plan(step_id: int, order: str | None = None, num_reqs: int = 2) -> SchedulerOutput:
    ids = [f"r{i}" for i in range(num_reqs)]
    scheduled = ScheduledRequests(ids, [0] * num_reqs, list(range(num_reqs)), [[]] * num_reqs, [True] * num_reqs)
    return SchedulerOutput(step_id, [], scheduled, [order] if order else [], [], [])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


async def gone(pid: int) -> bool:
    for _ in range(int(SOON / 0.01)):
        if not is_alive(pid):
            return True
        await asyncio.sleep(0.01)
    return False


def test_start_reports_progress_and_info() -> None:
    async def scenario() -> None:
        executor, seen = make_executor(), []
        info = await executor.start(lambda what, done, total: seen.append((what, done, total)))
        await executor.close()
        assert seen == [("loading", 1, 2), ("loading", 2, 2)]
        assert (info.device, info.block_bytes) == ("echo", 32)

    asyncio.run(scenario())


def test_results_come_in_the_order_of_plans() -> None:
    async def scenario() -> None:
        async with running() as executor:
            futures = [executor.submit(make_plan(step, num_reqs=step % 7)) for step in range(200)]
            outputs = await asyncio.gather(*futures)
        assert [output.step_id for output in outputs] == list(range(200))
        assert [output.sampled_token_ids for output in outputs] == [list(range(step % 7)) for step in range(200)]

    asyncio.run(scenario())


def test_plans_larger_than_the_ring_pass() -> None:
    async def scenario() -> None:
        async with running() as executor:
            plans = [make_plan(step, num_reqs=300_000) for step in range(3)]  # some 5 MB each
            outputs = await asyncio.gather(*map(executor.submit, plans))
        assert [len(output.request_ids) for output in outputs] == [300_000] * 3

    asyncio.run(scenario())


def test_a_step_that_raises_fails_alone() -> None:
    async def scenario() -> None:
        async with running() as executor:
            bad, good = executor.submit(make_plan(0, "raise")), executor.submit(make_plan(1))
            with pytest.raises(StepFailedError, match="step 0: ValueError: as asked"):
                await bad
            assert (await good).step_id == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("wrong", ConfigError, r"^--dtype is float8; allowed: float32$"),
        ("broken", WorkerDied, "could not start: RuntimeError: no such thing"),
        ("dies", WorkerDied, r"worker process \d+ exited with status 7 while it started"),
    ],
)
def test_a_failed_start_says_why(name: str, error: type[Exception], message: str) -> None:
    async def scenario() -> None:
        executor = make_executor(name)
        with pytest.raises(error, match=message):
            await executor.start()
        assert executor.pids == []

    asyncio.run(scenario())


@pytest.mark.parametrize(("order", "message"), [("kill", "was killed by SIGKILL"), ("exit 3", "exited with status 3")])
def test_death_fails_all_pending_steps(order: str, message: str) -> None:
    async def scenario() -> None:
        async with running() as executor:
            before = executor.submit(make_plan(0))
            doomed = [executor.submit(make_plan(1, order)), executor.submit(make_plan(2))]
            results = await asyncio.wait_for(asyncio.gather(before, *doomed, return_exceptions=True), SOON)
            assert not isinstance(results[0], BaseException)
            for error in results[1:]:
                assert isinstance(error, WorkerDied) and message in error.message
            with pytest.raises(WorkerDied):
                await executor.submit(make_plan(3))

    asyncio.run(scenario())


def test_a_worker_killed_while_it_computes_is_noticed_and_can_be_replaced() -> None:
    async def scenario() -> None:
        async with running() as executor:
            (old,) = executor.pids
            future = executor.submit(make_plan(0, "hang"))
            await asyncio.sleep(0.1)
            os.kill(old, signal.SIGKILL)
            with pytest.raises(WorkerDied, match=f"worker process {old} was killed by SIGKILL"):
                await asyncio.wait_for(future, SOON)
            await executor.start()
            assert executor.pids != [old]
            assert (await executor.submit(make_plan(1))).step_id == 1

    asyncio.run(scenario())


def test_a_cancelled_step_does_not_disturb_the_next() -> None:
    async def scenario() -> None:
        async with running() as executor:
            first, second = executor.submit(make_plan(0)), executor.submit(make_plan(1))
            first.cancel()
            assert (await second).step_id == 1

    asyncio.run(scenario())


def test_close_ends_the_worker_and_is_safe_to_repeat() -> None:
    async def scenario() -> None:
        executor = make_executor()
        await executor.start()
        (pid,) = executor.pids
        await executor.close()
        await executor.close()
        assert not is_alive(pid)
        with pytest.raises(WorkerDied):
            await executor.submit(make_plan(0))

    asyncio.run(scenario())


def test_close_while_starting_ends_both() -> None:
    async def scenario() -> None:
        executor = make_executor("slow")
        start = asyncio.create_task(executor.start())
        await asyncio.sleep(0.3)
        (pid,) = executor.pids
        await executor.close()
        with pytest.raises(WorkerDied, match="shut down"):
            await asyncio.wait_for(start, SOON)
        assert not is_alive(pid)

    asyncio.run(scenario())


def test_a_hanging_worker_is_killed_on_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servd.executor.multiproc.EXIT_SECONDS", 0.2)

    async def scenario() -> None:
        async with running() as executor:
            (pid,) = executor.pids
            future = executor.submit(make_plan(0, "hang"))
            await asyncio.sleep(0.1)
            await asyncio.wait_for(executor.close(), SOON)
            assert not is_alive(pid)
            with pytest.raises(WorkerDied, match="shut down"):
                await future

    asyncio.run(scenario())


def test_launch_starts_the_process_that_start_then_uses() -> None:
    async def scenario() -> None:
        executor = make_executor()
        executor.launch()
        pids = executor.pids
        await executor.start()
        assert executor.pids == pids and len(pids) == 1
        await executor.close()

    asyncio.run(scenario())


def test_a_launched_worker_is_closed_without_a_start() -> None:
    async def scenario() -> None:
        executor = make_executor()
        executor.launch()
        (pid,) = executor.pids
        await executor.close()
        assert not is_alive(pid)

    asyncio.run(scenario())


def test_the_worker_ignores_ctrl_c() -> None:
    async def scenario() -> None:
        async with running() as executor:
            os.kill(executor.pids[0], signal.SIGINT)
            assert (await executor.submit(make_plan(0))).step_id == 0

    asyncio.run(scenario())


FRONT = """
import asyncio, sys
from tests.unit.executor.test_multiproc import make_executor, make_plan
async def main():
    executor = make_executor()
    await executor.start()
    if sys.argv[1] == "busy":
        executor.submit(make_plan(0, "hang"))
    print(executor.pids[0], flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_the_worker_goes_when_the_front_is_killed(state: str) -> None:
    front = subprocess.Popen([sys.executable, "-c", FRONT, state], stdout=subprocess.PIPE, text=True, env=_env())
    with front:
        assert front.stdout is not None
        pid = int(front.stdout.readline())
        time.sleep(0.1)
        assert is_alive(pid)
        front.kill()
    assert asyncio.run(gone(pid))


@pytest.mark.parametrize("module", ["multiproc", "inproc", "protocol", "shm_channel", "base"])
def test_the_front_does_not_import_torch(module: str) -> None:
    code = f"import sys, servd.executor.{module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=_env(), check=False).returncode == 0


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


@pytest.mark.parametrize("how", ["hangs", "is stopped", "is idle"])
def test_a_worker_that_does_not_answer_can_be_killed_and_replaced(how: str) -> None:
    async def scenario() -> None:
        async with running() as executor:
            (pid,) = executor.pids
            if how == "is stopped":
                os.kill(pid, signal.SIGSTOP)
            pending = [] if how == "is idle" else [executor.submit(make_plan(i, "hang")) for i in range(2)]
            await asyncio.sleep(0.05)
            assert await executor.kill()
            for future in pending:
                with pytest.raises(WorkerDied, match="was killed"):
                    await future
            assert await gone(pid)
            assert isinstance(executor.submit(make_plan(8)).exception(), WorkerDied)
            await executor.start()
            assert (await executor.submit(make_plan(9))).step_id == 9

    asyncio.run(scenario())
