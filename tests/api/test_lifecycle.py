"""A server's life: health while loading, SIGTERM drains, a dead engine ends it, a second signal ends it at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
import uvloop

from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc as pb_grpc
from servd.api.lifecycle import Ready, run_server
from servd.config import EngineConfig, ServerConfig
from servd.errors import ConfigError, EngineUnavailableError, WorkerDied
from servd.executor.base import ProgressCallback
from servd.hub.files import ModelFiles
from servd.outputs import SchedulerOutput, WorkerInfo
from tests.fakes import VOCAB_SIZE, ByteTokenizer, FakeExecutor

Client = Callable[["Life"], Awaitable[None]]


class SlowStart(FakeExecutor):
    """Loads until `loaded` is set."""

    def __init__(self, config: EngineConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.loading = asyncio.Event()
        self.loaded = asyncio.Event()
        self.closed = False

    async def start(self, progress: ProgressCallback | None = None) -> WorkerInfo:
        self.loading.set()
        await self.loaded.wait()
        return await super().start(progress)

    async def close(self) -> None:
        self.closed = True
        await super().close()


class Life:
    """One `run_server` and what its client sees."""

    def __init__(self, folder: Path, *, server: dict[str, Any] | None = None, **options: Any) -> None:
        settings = options.pop("settings", {})
        (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048, "vocab_size": VOCAB_SIZE}))
        self.config = EngineConfig.from_flat(**settings)
        self.server_config = ServerConfig(**{"port": 0, "grpc_port": 0, "shutdown_grace": 5.0} | (server or {}))
        self.files = ModelFiles("fake", folder, ())
        self.executor = SlowStart(self.config, **options)
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.server = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await run_server(
            self.config, self.server_config, self.files, self.executor,
            on_ready=self.ready.set_result, tokenizer=ByteTokenizer(),  # type: ignore[arg-type]
        )  # fmt: skip

    async def stream(self, num_tokens: int) -> Any:
        """A gRPC call that has begun to answer."""
        ready = await self.ready
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{ready.grpc_port}")
        stub = pb_grpc.InferenceStub(self.channel)
        call = stub.Generate(pb.GenerateRequest(text="Hi", sampling_params=pb.SamplingParams(max_tokens=num_tokens)))
        await call.read()
        return call

    async def health(self) -> tuple[int, str]:
        """Status and state that /health tells."""
        ready = await self.ready
        url = f"http://127.0.0.1:{ready.http_port}/health"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, (await response.json())["state"]


def live(folder: Path, test: Client, **options: Any) -> None:
    """Run a test beside a server that is ready, until both have ended."""

    async def run() -> None:
        life = Life(folder, **options)
        life.executor.loaded.set()
        async with asyncio.timeout(20):
            await test(life)
            await life.server
        assert life.executor.closed

    uvloop.run(run())


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    async def test(life: Life) -> None:
        assert await life.health() == (200, "ready")
        call = await life.stream(60)
        terminate()
        await asyncio.sleep(0.05)
        assert await life.health() == (503, "draining")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await life.stream(5)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        num_tokens = 0
        while (chunk := await call.read()) is not grpc.aio.EOF:
            num_tokens += len(chunk.token_ids)
            last = chunk
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        assert last.usage.completion_tokens == 60

    live(tmp_path, test, step_delay=0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_idle_server_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    async def test(life: Life) -> None:
        ready = await life.ready
        assert ready.model_name == "named"
        assert ready.has_chat_template
        os.kill(os.getpid(), number)

    live(tmp_path, test, settings={"served_model_name": "named"})


def test_what_outlives_the_grace_is_ended_with_a_reason(tmp_path: Path) -> None:
    async def test(life: Life) -> None:
        call = await life.stream(1000)
        terminate()
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as error:
            while (chunk := await call.read()) is not grpc.aio.EOF:
                last = chunk
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert last.finish_reason == pb.FINISH_REASON_ABORT

    live(tmp_path, test, step_delay=0.01, server={"shutdown_grace": 0.1})


def test_grpc_can_be_turned_off(tmp_path: Path) -> None:
    async def test(life: Life) -> None:
        assert (await life.ready).grpc_port is None
        terminate()

    live(tmp_path, test, server={"grpc_port": -1})


def test_an_engine_that_failed_for_good_ends_the_server(tmp_path: Path) -> None:
    def die(plan: SchedulerOutput) -> None:
        raise WorkerDied("the fake worker always dies")

    async def run() -> None:
        life = Life(tmp_path, on_step=die, settings={"max_worker_restarts": 1})
        life.executor.loaded.set()
        assert await (await life.stream(5)).code() != grpc.StatusCode.OK
        async with asyncio.timeout(10):
            with pytest.raises(EngineUnavailableError, match="failed for good"):
                await life.server
        assert life.executor.closed

    uvloop.run(run())


def test_a_signal_while_loading_ends_it(tmp_path: Path) -> None:
    async def run() -> None:
        life = Life(tmp_path)
        await life.executor.loading.wait()
        terminate()
        async with asyncio.timeout(10):
            await life.server
        assert life.executor.closed
        assert not life.ready.done()

    uvloop.run(run())


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    class Broken(SlowStart):
        async def start(self, progress: ProgressCallback | None = None) -> WorkerInfo:
            raise ConfigError("the weights are torn")

    async def run() -> None:
        life = Life(tmp_path)
        life.server.cancel()
        life.executor = Broken(life.config)
        with pytest.raises(ConfigError, match="torn"):
            await life._run()
        assert life.executor.closed

    uvloop.run(run())


SECOND_SIGNAL = """
import asyncio, sys
from pathlib import Path
from tests.api.test_lifecycle import Life

async def main():
    life = Life(Path(sys.argv[1]), step_delay=0.05, server={"shutdown_grace": 60.0})
    life.executor.loaded.set()
    await life.stream(2000)
    print("streaming", flush=True)
    await life.server

asyncio.run(main())
"""


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SECOND_SIGNAL, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "streaming\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 128 + signal.SIGINT
