"""What the /v2 endpoints share: errors in the protocol's shape, and the model that a path names.

Knows nothing of tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from servd.api.http.errors import MAX_MESSAGE_CHARS, as_servd_error, error_response
from servd.api.http.middleware import client_is_gone
from servd.errors import ServdError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# A model's name may hold slashes: paths that end in a verb come before those that end in the name.
MODEL_PATHS = ("/v2/models/{model:.+?}/versions/{version}", "/v2/models/{model:.+?}")


def protocol_errors(handler: Handler) -> Handler:
    """Errors in the protocol's shape, {"error": text}."""

    @functools.wraps(handler)
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            if isinstance(error, ConnectionError) and client_is_gone(request):
                raise  # nobody is there to answer
            servd_error = as_servd_error(error)
            response = error_response(servd_error)
            response.body = protocol_error(servd_error)
            return response

    return handle


def protocol_error(error: ServdError) -> bytes:
    """The JSON of an error."""
    message = error.message[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()
    return msgspec.json.encode({"error": message})


def model_of(request: web.Request) -> tuple[str, str]:
    """Name and version of the model in the path; "" where there is none."""
    return request.match_info.get("model", ""), request.match_info.get("version", "")
