"""What every request passes: an id and a log line, errors as JSON, the API key, and browsers of other sites.

Knows nothing of bodies. Prompts never reach the log.
"""

from __future__ import annotations

import ipaddress
import logging
import time
import uuid

from aiohttp import web
from aiohttp.typedefs import Handler

from servd.api.access import ANONYMOUS, count_request, set_caller
from servd.api.http import cors
from servd.api.http.context import ARRIVAL, CALLER, ERROR_BODIES, KEYS, PUBLIC_ROUTES, REQUEST_ID, SERVER_CONFIG
from servd.api.http.errors import ForbiddenError, as_servd_error, error_response
from servd.api.http.resumable_streams import LAST_EVENT_ID
from servd.api.service import REQUEST_ID_SHAPE, set_call_id
from servd.errors import ServdError

MAX_OFFERED_KEYS = 4  # each unknown one is compared with all of the file
CLIENT_CLOSED_REQUEST = 499  # nginx's number for the log line of a client that went away

_FREE_POSTS = ("/v1/responses/{response_id}/cancel", "/v2/repository/index")  # see access.count_request
_log = logging.getLogger("servd.http")


@web.middleware
async def identify_and_log(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id (the client's own, if it is harmless) and log one line when it is over."""
    offered = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = offered if REQUEST_ID_SHAPE.fullmatch(offered) else uuid.uuid4().hex
    request[ARRIVAL] = time.monotonic()
    request[CALLER] = ANONYMOUS
    set_call_id(request[REQUEST_ID])
    status = CLIENT_CLOSED_REQUEST
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        milliseconds = (time.monotonic() - request[ARRIVAL]) * 1000
        _log.info(
            "%s %s %d %.0f ms %s %s %s", request.method[:16], request.path[:200], status, milliseconds,
            request.remote, request[CALLER].name, request[REQUEST_ID],
        )  # fmt: skip


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: runs before any reply's headers go out, streams included."""
    response.headers["Server"] = "servd"
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]
        if request.path.startswith("/v1/messages"):  # what Anthropic's clients call it
            response.headers["request-id"] = request[REQUEST_ID]
    if CALLER in request and (limits := request[CALLER].limits) is not None:
        response.headers.update(limits.headers())
    cors.add_headers(request, response)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what the handler raised into the error shape of the path's dialect: OpenAI's, unless it has its own."""
    try:
        return await handler(request)
    except Exception as error:
        if isinstance(error, ConnectionError) and client_is_gone(request):
            raise  # nobody is there to answer
        shown = as_servd_error(error)
        response = error_response(shown, _dialect_body(request, shown))
        if isinstance(error, web.HTTPMethodNotAllowed):
            response.headers["Allow"] = error.headers["Allow"]
        return response


def _dialect_body(request: web.Request, error: ServdError) -> bytes | None:
    for prefix, body in request.app[ERROR_BODIES].items():
        if request.path == prefix or request.path.startswith(prefix + "/"):
            return body(error, request[REQUEST_ID])
    return None


def client_is_gone(request: web.Request) -> bool:
    """Whether the connection is closed: a ConnectionError may also come from somewhere else."""
    return request.transport is None or request.transport.is_closing()


@web.middleware
async def check_access(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Demand a key; where there is none, keep web pages of other sites out. Counts calls that make work."""
    config, keys = request.app[SERVER_CONFIG], request.app[KEYS]
    if (preflight := cors.preflight(request, config.cors_origin)) is not None:
        return preflight  # browsers send no key with it; the same for all paths, so it tells nothing
    # Judged by the route that will run, never by a URL that the Host header had a part in.
    resource = request.match_info.route.resource
    if not keys.is_open:
        if resource is None or resource.canonical not in request.app[PUBLIC_ROUTES]:
            caller = request[CALLER] = keys.caller(_offered_keys(request))
            set_caller(caller)
            if _makes_work(request):
                count_request()
    elif not cors.is_named(request.headers.get("Origin"), config.cors_origin):
        _check_origin(request, is_local=_is_this_machine(config.host))
    set_caller(request[CALLER])
    return await handler(request)


def _makes_work(request: web.Request) -> bool:
    resource = request.match_info.route.resource
    if request.method != "POST" or (resource is not None and resource.canonical in _FREE_POSTS):
        return False
    return not request.headers.get(LAST_EVENT_ID)  # such a POST reads on in a stream, or is refused


def _offered_keys(request: web.Request) -> list[str]:
    """OpenAI's clients send Authorization: Bearer, Anthropic's x-api-key; some both, one of them a dummy."""
    offered = []
    for value in request.headers.getall("Authorization", []):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            offered.append(key.strip())
    return (offered + request.headers.getall("x-api-key", []))[:MAX_OFFERED_KEYS]


def _check_origin(request: web.Request, *, is_local: bool) -> None:
    """Raise ForbiddenError for a page of another site (CSRF), or a name that was rebound to 127.0.0.1."""
    host = request.headers.get("Host", "")
    if is_local and not _is_local_name(_host_name(host)):
        raise ForbiddenError("header Host names another machine; allowed without an API key: localhost, an address")
    origin = request.headers.get("Origin")
    if origin is not None and _is_foreign_page(origin, own="" if is_local else host):
        raise ForbiddenError(
            "header Origin names another site; allowed without an API key: this server, localhost, --cors-origin"
        )


def _is_foreign_page(origin: str, own: str) -> bool:
    scheme, _, host = origin.partition("://")
    if origin == "null":  # what sandboxed frames send
        return True
    if scheme.lower() not in ("http", "https"):  # desktop applications
        return False
    return host.lower() != own.lower() and not _is_local_name(_host_name(host))


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
