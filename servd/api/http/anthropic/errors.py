"""Failures in Anthropic's shape: {"type": "error", "error": {"type", "message"}, "request_id"}.

Source: Anthropic's API reference (errors). Knows nothing of routes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from servd.api.http.errors import MAX_MESSAGE_CHARS
from servd.errors import ServdError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_dict(error: ServdError) -> dict[str, Any]:
    """{"type", "message"}; the message names the field."""
    kind = _TYPES.get(error.http_status, "api_error" if error.http_status >= 500 else "invalid_request_error")
    return {"type": kind, "message": error.message[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()}


def anthropic_error_json(error: ServdError, request_id: str) -> bytes:
    """The body of a reply that tells of an error."""
    return msgspec.json.encode({"type": "error", "error": error_dict(error), "request_id": request_id})
