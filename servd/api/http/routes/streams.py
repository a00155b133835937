"""GET /v1/streams/{id}: the events of a resumable stream, again or further, for clients that can only GET.

The same as repeating the call with Last-Event-ID (see `servd.api.http.event_stream`).
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from servd.api.http.context import CALLER, RESUMABLE_STREAMS
from servd.api.http.event_stream import send_pieces
from servd.api.http.openapi import Endpoint, Operation
from servd.api.http.resumable_streams import LAST_EVENT_ID
from servd.errors import NotFoundError


async def resume_stream(request: web.Request) -> web.StreamResponse:
    """Events after the one in Last-Event-ID, else after number `after` (default 0: all that are kept)."""
    position = f"{request.match_info['stream_id']}:{request.query.get('after', '0')}"
    event_id = request.headers.get(LAST_EVENT_ID) or position
    return await send_pieces(request, request.app[RESUMABLE_STREAMS].resume(event_id, request[CALLER].tenant))


ROUTES = [
    Endpoint(
        "GET", "/v1/streams/{stream_id}", resume_stream,
        Operation(
            "Go on with a resumable stream", events=dict[str, Any], errors=(NotFoundError,),
            query={"after": {"type": "string", "pattern": "^[0-9]{1,11}$"}},
        ),
    )
]  # fmt: skip
