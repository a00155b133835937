"""A server's life: ports open, model loaded, ready, drained, closed.

Owns the order of these and the signals. Knows nothing of flags, nor of what a request is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from servd.api.access import KeyRing
from servd.api.grpc.server import GrpcServer, start_grpc
from servd.api.http.app import start_http, stop_http
from servd.api.service import InferenceService
from servd.config import EngineConfig, ServerConfig
from servd.engine.async_engine import AsyncEngine
from servd.engine.tokenizer import Tokenizer
from servd.errors import EngineUnavailableError
from servd.executor.base import Executor, ProgressCallback
from servd.hub import ModelFiles

logger = logging.getLogger(__name__)

GRPC_STOP_SECONDS = 2.0  # calls are done by then: the engine was drained before


@dataclass(frozen=True, slots=True)
class Ready:
    """What a server that answers can be reached by."""

    model_name: str
    http_port: int
    grpc_port: int | None  # None: gRPC is off
    has_chat_template: bool


async def run_server(
    config: EngineConfig,
    server_config: ServerConfig,
    files: ModelFiles,
    executor: Executor,
    *,
    on_ready: Callable[[Ready], None],
    tokenizer: Tokenizer | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain for at most `server_config.shutdown_grace` seconds.

    The ports are open while the model loads: health says so. A second signal ends the process at once. Raises
    ConfigError (address, model, flag), WorkerDied, or EngineUnavailableError if the engine fails for good.
    """
    stop = _stop_on_signals()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(executor.close)
        executor.files = files
        engine = AsyncEngine(config, files, tokenizer, executor, log_steps=server_config.log_steps)
        stack.push_async_callback(engine.close)
        service = InferenceService(
            engine,
            config.model.served_model_name or files.name,
            tool_call_parser=server_config.tool_call_parser,
            reasoning_parser=server_config.reasoning_parser,
        )
        keys = KeyRing.of(server_config)  # one for both fronts: a key's limits are of all its calls
        runner, http_port = await start_http(service, server_config, keys=keys)
        stack.push_async_callback(stop_http, runner)
        grpc_server: GrpcServer | None = None
        if server_config.grpc_port >= 0:
            grpc_server, _ = await start_grpc(service, server_config, keys=keys)
            stack.push_async_callback(grpc_server.stop, GRPC_STOP_SECONDS)
        if await _stopped_before(stop, engine.start(progress)):
            return
        _log_kv_cache(engine)
        on_ready(
            Ready(
                service.model_name,
                http_port,
                None if grpc_server is None else grpc_server.port,
                engine.tokenizer.has_chat_template,
            )
        )
        if not await _stopped_before(stop, engine.wait_dead()):
            raise EngineUnavailableError("the engine failed for good; the log above says why")
        logger.info(
            "shutting down: running requests get %g s; a second signal ends it at once", server_config.shutdown_grace
        )
        if grpc_server is not None:
            await grpc_server.report_not_serving()
        await engine.drain(server_config.shutdown_grace)


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def handle(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)  # workers end by themselves when this process is gone
        stop.set()

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # a closed terminal; under nohup it stays ignored
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, handle, number)
    return stop


async def _stopped_before(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Wait for either; whether it was `stop` (then `work` is cancelled). Raises what `work` raises."""
    tasks = [asyncio.create_task(stop.wait()), asyncio.create_task(work)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    stopped, worked = tasks
    if not worked.cancelled():
        worked.result()
    return not stopped.cancelled()


def _log_kv_cache(engine: AsyncEngine) -> None:
    stats = engine.stats()
    num_tokens = stats.num_blocks * stats.block_size
    logger.info(
        "KV cache: %d blocks of %d tokens, %d tokens in all: %.1f requests of the full %d tokens at once",
        stats.num_blocks, stats.block_size, num_tokens, num_tokens / engine.max_model_len, engine.max_model_len,
    )  # fmt: skip
