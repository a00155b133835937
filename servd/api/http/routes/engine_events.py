"""GET /v1/engine/events: what the engine is doing, a few times a second, as server-sent events.

Knows nothing of what a frame holds.
"""

from __future__ import annotations

from contextlib import aclosing

from aiohttp import web

from servd.api.http.context import CALLER, ENGINE_FEED
from servd.api.http.event_stream import send_events
from servd.api.http.openapi import Endpoint, Operation
from servd.api.http.resumable_streams import EventSource
from servd.engine.observer import EngineFeed, EngineView
from servd.errors import OverloadedError


async def engine_events(request: web.Request) -> web.StreamResponse:
    """Follow the engine: one event a quarter of a second while there is work, one a second while there is none.

    A listener that reads slowly misses events; one that reads nothing is cut off. The stream ends when the server
    shuts down. No text or token of any request is in it, and of other tenants' requests only how many there are.
    """
    feed = request.app[ENGINE_FEED]
    feed.check_room()
    return await send_events(request, "engine", _events(feed, request[CALLER].tenant))


async def _events(feed: EngineFeed, tenant: str) -> EventSource:
    async with aclosing(feed.frames(tenant)) as frames:
        async for frame in frames:
            yield [b"data: %b\n\n" % frame]


ROUTES = [
    Endpoint(
        "GET", "/v1/engine/events", engine_events,
        Operation("Follow the engine", events=EngineView, errors=(OverloadedError,)),
    )
]  # fmt: skip
