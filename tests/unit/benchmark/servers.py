"""A server that follows a script, for the load generator to meet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def scripted_server(**routes: Handler) -> AsyncIterator[str]:
    """A server whose routes are given as path=handler, "_" for "/"; yields its URL."""
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
