"""What probes are told while the engine starts, works, hangs, recovers and drains; none of them needs a key.

Fault 38's class: a worker that does not die, but computes nothing more.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from servd.config import EngineConfig, ServerConfig
from servd.errors import ConfigError
from servd.executor.base import ProgressCallback
from servd.outputs import ModelRunnerOutput, SchedulerOutput, WorkerInfo
from tests.api.http.serving import COMPLETIONS, Served, serve

BODY = {"prompt": "canary", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
QUICK = {"step_timeout": 0.2, "max_worker_restarts": 100}  # seconds; a busy machine may be slower now and then


async def probe(server: Served) -> list[tuple[int, str]]:
    """Status and state of /livez, /readyz and /health."""
    replies = [await server.request("GET", path) for path in ("/livez", "/readyz", "/health")]
    return [(reply.status, reply.json()["state"]) for reply in replies]


def test_a_worker_that_hangs_is_replaced_and_no_token_is_lost(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=ServerConfig(port=0, api_key="k"), settings=QUICK) as server:
            headers = {"Authorization": "Bearer k"}
            expected = (await server.post(COMPLETIONS, BODY, headers=headers)).json()["choices"]
            assert await probe(server) == [(200, "ready")] * 3

            start, may_start = server.executor.start, asyncio.Event()

            async def slow_start(progress: ProgressCallback | None = None) -> WorkerInfo:
                await may_start.wait()
                server.executor.gate.set()
                return await start(progress)

            server.executor.start = slow_start  # type: ignore[method-assign]
            server.executor.gate.clear()
            answer = asyncio.create_task(server.post(COMPLETIONS, BODY, headers=headers))
            await server.fake.wait_until(lambda: server.engine.state == "recovering")
            assert await probe(server) == [(200, "recovering"), (503, "recovering"), (503, "recovering")]
            may_start.set()
            reply = await answer
            assert (reply.status, reply.json()["choices"]) == (200, expected)
            assert server.executor.num_starts >= 2
            assert await probe(server) == [(200, "ready")] * 3

    asyncio.run(main())


def test_requests_that_hang_every_worker_are_failed_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, settings=QUICK) as server:
            executor = server.executor
            start, submit = executor.start, executor.submit

            def submit_or_hang(plan: SchedulerOutput) -> asyncio.Future[ModelRunnerOutput]:
                if any(bytes(new.token_ids[:6]) == b"poison" for new in plan.new_requests):
                    executor.gate.clear()
                return submit(plan)

            async def fresh(progress: ProgressCallback | None = None) -> WorkerInfo:
                executor.gate.set()
                return await start(progress)

            executor.submit, executor.start = submit_or_hang, fresh  # type: ignore[method-assign]
            async with asyncio.timeout(60):
                reply = await server.post(COMPLETIONS, BODY | {"prompt": "poison"})
            assert (reply.status, reply.error()["code"]) == (500, "request_failed")
            assert (await server.post(COMPLETIONS, BODY)).status == 200

    asyncio.run(main())


def test_an_idle_engine_is_not_taken_for_a_hung_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, settings=QUICK) as server:
            await server.post(COMPLETIONS, BODY)
            starts = server.executor.num_starts
            await asyncio.sleep(0.5)
            assert (await server.post(COMPLETIONS, BODY)).status == 200
            assert server.executor.num_starts == starts

    asyncio.run(main())


def test_a_draining_server_lives_but_is_not_ready(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            await server.engine.drain(0)
            assert await probe(server) == [(200, "draining"), (503, "draining"), (503, "draining")]

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_the_limit_is_checked(seconds: float) -> None:
    with pytest.raises(ConfigError, match="--step-timeout"):
        EngineConfig.from_flat(step_timeout=seconds).resolve()
