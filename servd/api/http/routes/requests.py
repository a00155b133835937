"""GET /v1/requests and /v1/requests/{id}: what became of one's requests, and why one was slow.

Knows nothing of how it is found out.
"""

from __future__ import annotations

from aiohttp import web

from servd.api.http.context import SERVICE
from servd.api.http.openapi import Endpoint, Operation
from servd.api.http.query import choice, whole_number
from servd.api.http.replies import json_reply
from servd.api.http.reply_types import RequestDescription, RequestList
from servd.engine.request_log import MAX_FINISHED
from servd.errors import NotFoundError

STATES = ("waiting", "running", "finished")


async def list_requests(request: web.Request) -> web.Response:
    """Newest first. Query: state; limit (default 100)."""
    state = choice(request.query, "state", "", STATES) or None
    limit = whole_number(request.query, "limit", 100, 1, MAX_FINISHED)
    found = request.app[SERVICE].list_requests(state=state, limit=limit)
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
