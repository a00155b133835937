"""GET /v1/engine/events: what the engine is doing, a few times a second, as server-sent events.

Knows nothing of what a frame holds.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from aiohttp import web

from servd.api.http.context import CALLER, ENGINE_FEED, WRITE_TIMEOUT
from servd.api.http.openapi import EVENTS, Endpoint, Operation
from servd.engine.observer import EngineView
from servd.errors import OverloadedError


async def engine_events(request: web.Request) -> web.StreamResponse:
    """Follow the engine: one event a quarter of a second while there is work, one a second while there is none.

    A listener that reads slowly misses events; one that reads nothing is cut off. The stream ends when the server
    shuts down. No text or token of any request is in it, and of other tenants' requests only how many there are.
    """
    feed = request.app[ENGINE_FEED]
    feed.check_room()
    response = web.StreamResponse(
        headers={"Content-Type": EVENTS, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
    await response.prepare(request)
    async with aclosing(feed.frames(request[CALLER].tenant)) as frames:
        async for frame in frames:
            try:
                async with asyncio.timeout(request.app[WRITE_TIMEOUT]):
                    await response.write(b"data: " + frame + b"\n\n")
            except TimeoutError:
                if request.transport is not None:
                    request.transport.abort()
                raise ConnectionResetError("the client does not read") from None
    await response.write_eof()
    return response


ROUTES = [
    Endpoint(
        "GET", "/v1/engine/events", engine_events,
        Operation("Follow the engine", events=EngineView, errors=(OverloadedError,)),
    )
]  # fmt: skip
