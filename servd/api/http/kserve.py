"""What the /v2 endpoints share: errors in the protocol's shape, and the model that a path names.

Knows nothing of tensors.
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from servd.api.http.errors import MAX_MESSAGE_CHARS
from servd.errors import ServdError

# A model's name may hold slashes: paths that end in a verb come before those that end in the name.
MODEL_PATHS = ("/v2/models/{model:.+?}/versions/{version}", "/v2/models/{model:.+?}")


def kserve_error_json(error: ServdError, request_id: str = "") -> bytes:
    """The body of a reply, or the data of an event, that tells of an error: {"error": text}."""
    message = error.message[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()
    return msgspec.json.encode({"error": message})


def model_of(request: web.Request) -> tuple[str, str]:
    """Name and version of the model in the path; "" where there is none."""
    return request.match_info.get("model", ""), request.match_info.get("version", "")
