"""Servers for the load generator to meet: servd's real HTTP front over a fake worker, and one that follows a script."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from servd.api.http.app import start_http, stop_http
from servd.api.service import InferenceService
from servd.config import ServerConfig
from tests.fakes import FakeEngine


class ServdServer:
    """servd over a fake worker, in a thread of its own; its tokenizer makes a token of each byte."""

    def __init__(self, folder: Path, config: ServerConfig | None = None, **settings: Any) -> None:
        self.folder = folder
        self.settings = settings  # flat EngineConfig names
        self.config = config or ServerConfig(port=0)

    def __enter__(self) -> ServdServer:
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with FakeEngine(self.folder, self.settings) as self.fake:
            runner, port = await start_http(InferenceService(self.fake.engine, "fake"), self.config)
            self.url = f"http://127.0.0.1:{port}"
            self._up.set()
            await self._stop.wait()
            await stop_http(runner)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def scripted_server(**routes: Handler):
    """A server whose routes are given as path="handler", "_" for "/"; yields its URL."""
    app = web.Application()
    for path, handler in routes.items():
        app.router.add_route("*", "/" + path.replace("_", "/"), handler)
    runner = web.AppRunner(app, handler_cancellation=True)  # one that waits must not hold up the end
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def streaming(*parts: bytes) -> Handler:
    """A handler that sends these bytes, each in a write of its own, and ends."""

    async def handle(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)  # so that parts arrive apart
        return response

    return handle


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def text_event(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


DONE = b"data: [DONE]\n\n"
