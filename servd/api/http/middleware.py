"""What every request passes: an id and a log line, errors as JSON, the API key, and browsers of other sites.

Knows nothing of bodies. Prompts never reach the log.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
import uuid

from aiohttp import web
from aiohttp.typedefs import Handler

from servd.api.access import ANONYMOUS
from servd.api.http.context import ARRIVAL, CALLER, REQUEST_ID, SERVER_CONFIG
from servd.api.http.errors import ForbiddenError, as_servd_error, error_response
from servd.api.service import set_call_id
from servd.errors import AuthenticationError

PUBLIC_ROUTE = "/health"  # probes carry no key
CLIENT_CLOSED_REQUEST = 499  # nginx's number for the log line of a client that went away

_REQUEST_ID_SHAPE = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger("servd.http")


@web.middleware
async def identify_and_log(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id (the client's own, if it is harmless) and log one line when it is over."""
    offered = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = offered if _REQUEST_ID_SHAPE.fullmatch(offered) else uuid.uuid4().hex
    request[ARRIVAL] = time.monotonic()
    set_call_id(request[REQUEST_ID])
    status = CLIENT_CLOSED_REQUEST
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        milliseconds = (time.monotonic() - request[ARRIVAL]) * 1000
        _log.info(
            "%s %s %d %.0f ms %s %s", request.method[:16], request.path[:200], status, milliseconds,
            request.remote, request[REQUEST_ID],
        )  # fmt: skip


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: runs before any reply's headers go out, streams included."""
    response.headers["Server"] = "servd"
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what the handler raised into OpenAI's error shape."""
    try:
        return await handler(request)
    except Exception as error:
        if isinstance(error, ConnectionError) and client_is_gone(request):
            raise  # nobody is there to answer
        response = error_response(as_servd_error(error))
        if isinstance(error, web.HTTPMethodNotAllowed):
            response.headers["Allow"] = error.headers["Allow"]
        return response


def client_is_gone(request: web.Request) -> bool:
    """Whether the connection is closed: a ConnectionError may also come from somewhere else."""
    return request.transport is None or request.transport.is_closing()


@web.middleware
async def check_access(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Demand the API key; where there is none, keep web pages of other sites out of a server meant for this machine."""
    config = request.app[SERVER_CONFIG]
    request[CALLER] = ANONYMOUS
    # Judged by the route that will run, never by a URL that the Host header had a part in.
    resource = request.match_info.route.resource
    if config.api_key is not None:
        if resource is None or resource.canonical != PUBLIC_ROUTE:
            _check_key(request.headers.get("Authorization", ""), config.api_key)
    elif _is_this_machine(config.host):
        _check_origin(request)
    return await handler(request)


def _check_key(authorization: str, api_key: str) -> None:
    scheme, _, offered = authorization.partition(" ")
    same = hmac.compare_digest(offered.strip().encode(errors="surrogateescape"), api_key.encode())
    if scheme.lower() != "bearer" or not same:
        problem = "is missing" if not authorization else "does not hold a valid key"
        raise AuthenticationError(f"header Authorization {problem}; needed: Bearer API_KEY")


def _check_origin(request: web.Request) -> None:
    """Raise ForbiddenError for a page of another site (CSRF), or a name that was rebound to 127.0.0.1."""
    if not _is_local_name(_host_name(request.headers.get("Host", ""))):
        raise ForbiddenError("header Host names another machine; allowed without an API key: localhost, an address")
    origin = request.headers.get("Origin")
    if origin is not None and _is_foreign_page(origin):
        raise ForbiddenError("header Origin names another site; allowed without an API key: localhost")


def _is_foreign_page(origin: str) -> bool:
    scheme, _, host = origin.partition("://")
    # 'null' is what sandboxed frames send; schemes other than http belong to desktop applications.
    return origin == "null" or (scheme.lower() in ("http", "https") and not _is_local_name(_host_name(host)))


def _host_name(host: str) -> str:
    """'[::1]:8000' → '::1', 'localhost:8000' → 'localhost'."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().rstrip(".")


def _is_local_name(name: str) -> bool:
    """Whether a name can only lead here: rebinding needs a name of the attacker's, so addresses are fine."""
    return name in ("", "localhost") or name.endswith(".localhost") or _is_address(name)


def _is_this_machine(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
