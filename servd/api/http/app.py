"""The HTTP server: the application, its routes by discovery, and how it starts and stops.

Knows nothing of what the routes do.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
import socket
from collections.abc import AsyncIterator
from http import HTTPStatus

from aiohttp import http_exceptions, web

from servd import __version__
from servd.api.access import KeyRing
from servd.api.http import routes
from servd.api.http.anthropic.errors import anthropic_error_json
from servd.api.http.context import (
    BODY_TIMEOUT,
    ENGINE_FEED,
    ERROR_BODIES,
    KEEP_ALIVE,
    KEYS,
    PUBLIC_ROUTES,
    RESPONSES,
    RESUMABLE_STREAMS,
    SERVER_CONFIG,
    SERVICE,
    WRITE_TIMEOUT,
    ErrorBody,
)
from servd.api.http.errors import (
    BadHTTPError,
    HeadersTooLargeError,
    UriTooLongError,
    as_servd_error,
    error_response,
)
from servd.api.http.event_stream import resume_streams
from servd.api.http.kserve import kserve_error_json
from servd.api.http.middleware import add_headers, check_access, errors_as_json, identify_and_log
from servd.api.http.openapi import API_DOCUMENT, ApiDocument, Endpoint
from servd.api.http.responses.store import ResponseStore
from servd.api.http.resumable_streams import ResumableStreams
from servd.api.service import InferenceService
from servd.api.tls import RELOAD_SECONDS, TlsContext, TlsFiles
from servd.config import ServerConfig
from servd.engine.observer import EngineFeed, EngineObserver
from servd.errors import ConfigError, ServdError

KEEPALIVE_SECONDS = 75.0  # also what a client has to send the head of a request
SHUTDOWN_SECONDS = 2.0  # handlers are done by then: the engine was drained before
BACKLOG = 2048
_TLS = web.AppKey("tls", TlsContext)

_log = logging.getLogger("servd.http")
_NO_ACCESS_LOG = logging.getLogger("servd.http.aiohttp_access")  # the middleware writes the one line a request
_NO_ACCESS_LOG.disabled = True


class _Protocol(web.RequestHandler):
    """aiohttp's connection, with JSON instead of plain text where the bytes were not even HTTP."""

    __slots__ = ("_tls", "_write_timeout")

    def __init__(
        self, manager: web.Server, config: ServerConfig, write_timeout: float, tls: TlsContext | None
    ) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEPALIVE_SECONDS,
            access_log=_NO_ACCESS_LOG,
            auto_decompress=False,  # compressed bodies are refused
            max_line_size=config.max_request_line,
            max_field_size=config.max_header_bytes,
            max_headers=config.max_headers,
        )
        self._write_timeout = write_timeout
        self._tls = tls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._tls is not None and self._tls.is_void(transport.get_extra_info("ssl_object")):
            _log.info("a connection takes up a session from before the client authorities changed: cut off")
            self.force_close()
            return
        # A whole reply, and the end of a stream, wait in buffers that no handler watches: the system cuts the client
        # off that reads nothing of them for so long.
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(1000 * self._write_timeout)))

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException):  # aiohttp looks at Expect before any middleware runs
            _log.info("%s refused for %s", resp.reason, request.remote)
            resp = error_response(as_servd_error(resp))
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an error after the reply has begun: the connection is cut")
        error: ServdError = self._head_error(exc)
        if status == HTTPStatus.BAD_REQUEST:
            _log.info("bad HTTP %d from %s", error.http_status, request.remote)
        else:
            self.log_exception("Error handling a request", exc_info=exc)
            error = ServdError("the server failed to handle this request; its log has the reason")
        response = error_response(error)
        response.force_close()
        return response

    def _head_error(self, error: BaseException | None) -> BadHTTPError:
        if isinstance(error, http_exceptions.LineTooLong):
            limit = error.args[1]
            if limit == self.max_line_size:
                return UriTooLongError(f"the request line is too long; allowed: {limit} bytes")
            return HeadersTooLargeError(f"a header is too long; allowed: {limit} bytes")
        if isinstance(error, http_exceptions.BadHttpMessage) and error.message.startswith("Too many headers"):
            return HeadersTooLargeError(f"there are too many headers; allowed: {self.max_headers}")
        return BadHTTPError("the request is not valid HTTP/1.1")


class _Server(web.Server):
    config = ServerConfig()
    write_timeout = 60.0  # seconds
    tls: TlsContext | None = None

    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, self.config, self.write_timeout, self.tls)


class _Runner(web.AppRunner):
    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        # Without handler_cancellation the handler of a non-streaming call would run on for a client long gone.
        server = _Server(server.request_handler, request_factory=server.request_factory, handler_cancellation=True)
        server.config, server.write_timeout = self.app[SERVER_CONFIG], self.app[WRITE_TIMEOUT]
        server.tls = self.app.get(_TLS)
        return server


def create_app(
    service: InferenceService,
    server_config: ServerConfig,
    *,
    keys: KeyRing | None = None,
    write_timeout: float = 60.0,
    body_timeout: float = 60.0,
) -> web.Application:
    """The application with all routes of `servd.api.http.routes`. Timeouts are in seconds.

    keys: those of the config, if the other fronts do not share them.
    """
    app = web.Application(
        middlewares=[identify_and_log, errors_as_json, check_access, resume_streams],
        client_max_size=server_config.max_body_bytes,
    )
    app[SERVICE] = service
    app[SERVER_CONFIG] = server_config
    app[KEYS] = KeyRing.of(server_config) if keys is None else keys
    app[WRITE_TIMEOUT] = write_timeout
    app[BODY_TIMEOUT] = body_timeout
    app[KEEP_ALIVE] = server_config.sse_keep_alive
    app[RESUMABLE_STREAMS] = ResumableStreams(server_config.resume_seconds, server_config.resume_buffer_bytes)
    error_bodies: dict[str, ErrorBody] = {"/v1/messages": anthropic_error_json, "/v2": kserve_error_json}
    app[ERROR_BODIES] = error_bodies
    app[RESPONSES] = ResponseStore()
    app.on_shutdown.append(_close_kept_streams)
    app.on_response_prepare.append(add_headers)
    endpoints = [endpoint for route_file in discover_routes() for endpoint in route_file]
    app.router.add_routes(endpoints)
    app[PUBLIC_ROUTES] = frozenset(endpoint.path for endpoint in endpoints if endpoint.operation.public)
    app[API_DOCUMENT] = ApiDocument(endpoints)
    app[ENGINE_FEED] = EngineFeed(EngineObserver(service.engine, service.model_name, __version__))
    return app


async def _close_kept_streams(app: web.Application) -> None:
    await app[RESUMABLE_STREAMS].close()
    await app[RESPONSES].close()


def discover_routes() -> list[list[Endpoint]]:
    """`ROUTES` of each file in the routes folder: a new endpoint is a new file there."""
    names = sorted(module.name for module in pkgutil.iter_modules(routes.__path__))
    return [importlib.import_module(f"{routes.__name__}.{name}").ROUTES for name in names]


async def start_http(
    service: InferenceService,
    server_config: ServerConfig,
    *,
    keys: KeyRing | None = None,
    write_timeout: float = 60.0,
    body_timeout: float = 60.0,
) -> tuple[web.AppRunner, int]:
    """Listen on host and port of the config; returns what `stop_http` takes, and the port.

    Raises ConfigError if the address cannot be had.
    """
    app = create_app(service, server_config, keys=keys, write_timeout=write_timeout, body_timeout=body_timeout)
    context = None
    if (files := TlsFiles.of(server_config)) is not None:
        tls = TlsContext(files)
        context = tls.context
        app[_TLS] = tls
        app.cleanup_ctx.append(lambda _: _following(tls))
    runner = _Runner(app, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    site = web.TCPSite(runner, server_config.host, server_config.port, backlog=BACKLOG, ssl_context=context)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(
            f"--host {server_config.host} --port {server_config.port} cannot be listened on: {error.strerror}"
        ) from None
    return runner, int(runner.addresses[0][1])


async def _following(tls: TlsContext) -> AsyncIterator[None]:
    """While the application lives, look for new certificates."""

    async def refresh() -> None:
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            tls.refresh()

    task = asyncio.create_task(refresh(), name="http-tls")
    yield
    task.cancel()


async def stop_http(runner: web.AppRunner) -> None:
    """Close the listening socket and all connections. Drain the engine first: handlers still running are cut off."""
    await runner.cleanup()
