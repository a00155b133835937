"""Every failure as JSON in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

The one place where exceptions meet HTTP statuses; knows nothing of routes.
"""

from __future__ import annotations

import logging
import math

import msgspec
from aiohttp import web

from servd.errors import AuthenticationError, NotFoundError, OverloadedError, PayloadTooLargeError, ServdError

MAX_MESSAGE_CHARS = 1000  # a message may quote what the client sent, which may be megabytes

_log = logging.getLogger("servd.http")


class ForbiddenError(ServdError):
    """A browser page of another site, or a name that should not lead here: 403."""

    http_status = 403
    type = "permission_error"
    code = "forbidden"


class UnknownPathError(NotFoundError):
    """No such endpoint."""

    code = "unknown_path"


class MethodNotAllowedError(ServdError):
    """The endpoint exists, for other methods."""

    http_status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BadHTTPError(ServdError):
    """The bytes on the connection are not HTTP."""

    http_status = 400
    type = "invalid_request_error"
    code = "bad_http"


class HeadersTooLargeError(BadHTTPError):
    """A header, or their number, is over the limit: 431."""

    http_status = 431
    code = "headers_too_large"


class UriTooLongError(BadHTTPError):
    """The request line is over the limit: 414."""

    http_status = 414
    code = "uri_too_long"


class UnsupportedEncodingError(ServdError):
    """A compressed body: unpacking one of a few megabytes may take all memory, or the event loop for seconds."""

    http_status = 415
    type = "invalid_request_error"
    code = "unsupported_encoding"


def as_servd_error(error: BaseException) -> ServdError:
    """The ServdError that tells the client of `error`; what was not raised on purpose becomes a bare 500."""
    if isinstance(error, ServdError):
        return error
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return PayloadTooLargeError("the body is larger than this server takes")
    if isinstance(error, web.HTTPNotFound):
        return UnknownPathError("this server has no such endpoint")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowedError(f"method is {error.method}; allowed here: {allowed}")
    if isinstance(error, web.HTTPExpectationFailed):
        return BadHTTPError("header Expect asks for what this server cannot do; allowed: 100-continue")
    if isinstance(error, web.HTTPException) and 400 <= error.status < 500:
        return BadHTTPError(error.reason)
    # Its text may hold paths or addresses: those go to the log alone.
    _log.error("unexpected error in a handler", exc_info=error)
    return ServdError("the server failed to handle this request; its log has the reason")


def error_json(error: ServdError) -> bytes:
    """The reply's body."""
    message = error.message[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()
    param = None if error.param is None else error.param[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()
    return msgspec.json.encode(
        {"error": {"message": message, "type": error.type, "param": param, "code": error.code}}
    )


def error_response(error: ServdError, body: bytes | None = None) -> web.Response:
    """The whole reply: status, headers and body; `body`: where the route's dialect has a shape of its own."""
    body = error_json(error) if body is None else body
    response = web.Response(status=error.http_status, body=body, content_type="application/json")
    if isinstance(error, OverloadedError):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, AuthenticationError):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response
