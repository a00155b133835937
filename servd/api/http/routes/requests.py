"""GET /v1/requests and /v1/requests/{id}: what became of one's requests, and why one was slow.

Knows nothing of how it is found out.
"""

from __future__ import annotations

from aiohttp import web

from servd.api.http.context import SERVICE
from servd.api.http.openapi import Endpoint, Operation
from servd.api.http.replies import json_reply
from servd.api.http.reply_types import RequestDescription, RequestList
from servd.engine.request_log import MAX_FINISHED
from servd.errors import InvalidRequestError, NotFoundError

STATES = ("waiting", "running", "finished")


async def list_requests(request: web.Request) -> web.Response:
    """Newest first. Query: state; limit (default 100)."""
    for name in request.query:
        if name not in ("state", "limit"):
            raise InvalidRequestError(f"{name[:100]} is not a parameter; allowed: state, limit", param=name[:100])
    state, limit = request.query.get("state"), request.query.get("limit", "100")
    if state is not None and state not in STATES:
        raise InvalidRequestError(f"state is {state[:100]!r}; allowed: {', '.join(STATES)}", param="state")
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 4 and 1 <= int(limit) <= MAX_FINISHED):
        raise InvalidRequestError(f"limit is {limit[:100]!r}; allowed: 1 to {MAX_FINISHED}", param="limit")
    found = request.app[SERVICE].list_requests(state=state, limit=int(limit))
    return json_reply({"object": "list", "data": found})


async def retrieve_request(request: web.Request) -> web.Response:
    """By the id in the reply (chatcmpl-…), or its X-Request-Id."""
    return json_reply(request.app[SERVICE].describe_request(request.match_info["id"]))


ROUTES = [
    Endpoint(
        "GET", "/v1/requests", list_requests,
        Operation(
            "One's requests, running and lately finished", reply=RequestList,
            query={
                "state": {"enum": list(STATES)},
                "limit": {"type": "integer", "minimum": 1, "maximum": MAX_FINISHED},
            },
        ),
    ),
    Endpoint(
        "GET", "/v1/requests/{id}", retrieve_request,
        Operation("Why a request was slow", reply=RequestDescription, errors=(NotFoundError,)),
    ),
]  # fmt: skip
