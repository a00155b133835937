"""GET /health, /readyz, /livez and /version: for probes and people.

Knows nothing of load: that is in /metrics.
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from servd import __version__
from servd.api.http.context import SERVICE
from servd.api.http.openapi import Endpoint, Operation
from servd.api.http.replies import json_reply
from servd.api.http.reply_types import Health, Version


async def health(request: web.Request) -> web.Response:
    """200 while requests are taken and computed; 503 while starting, recovering, draining or dead."""
    state = request.app[SERVICE].engine.state
    return web.Response(
        status=200 if state == "ready" else 503,
        body=msgspec.json.encode({"state": state}),
        content_type="application/json",
    )


async def alive(request: web.Request) -> web.Response:
    """200 while this process answers at all: one that starts or recovers must not be killed for it."""
    return json_reply({"state": request.app[SERVICE].engine.state})


async def version(_: web.Request) -> web.Response:
    """The server's version."""
    return json_reply({"version": __version__})


_READY = Operation("Whether requests are taken", reply=Health, replies={503: Health}, public=True)

ROUTES = [
    Endpoint("GET", "/health", health, _READY),
    Endpoint("GET", "/readyz", health, _READY),
    Endpoint("GET", "/livez", alive, Operation("Whether the process answers", reply=Health, public=True)),
    Endpoint("GET", "/version", version, Operation("The server's version", reply=Version)),
]
