"""One stream of server-sent events to one client: numbered, kept alive while it waits, cut off when it is not read.

Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from types import TracebackType

from aiohttp import web
from aiohttp.typedefs import Handler

from servd.api.http.context import CALLER, KEEP_ALIVE, RESUMABLE_STREAMS, WRITE_TIMEOUT
from servd.api.http.middleware import client_is_gone
from servd.api.http.resumable_streams import LAST_EVENT_ID, EventSource, ReaderLostError
from servd.errors import UnsupportedError

_KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_log = logging.getLogger("servd.http")


async def send_events(
    request: web.Request, stream_id: str, source: EventSource, *, resumable: bool = False
) -> web.StreamResponse:
    """Send a source's events as they come, the n-th with the id 'STREAM_ID:n'; then close the source.

    A client that goes away, or leaves its events unread for `WRITE_TIMEOUT` seconds, ends the source, unless the
    stream is `resumable`: then the source goes on for a while without it (see `resumable_streams`). Raises
    ConnectionError when the client is gone, UnsupportedError and OverloadedError where streams cannot be resumed.
    """
    if resumable:
        streams = request.app[RESUMABLE_STREAMS]
        try:
            if not streams.enabled:
                raise UnsupportedError(
                    "stream_options.resumable is true; this server was started with --resume-seconds 0",
                    param="stream_options.resumable",
                )
            log = streams.start(stream_id, request[CALLER].tenant, source)
        except BaseException:
            await source.aclose()
            raise
        return await send_pieces(request, log.after(0))
    number = 1
    prefix = f"id: {stream_id}:%d\n".encode()
    try:
        async with _Line(request) as line:
            async for events in source:
                pieces: list[bytes] = []
                for event in events:
                    pieces += prefix % number, event
                    number += 1
                await line.write(b"".join(pieces))
    finally:
        # First, and without a pause: the handler may be cancelled at its next one, while it is already on its way out.
        await source.aclose()
    return line.response


async def send_pieces(request: web.Request, pieces: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """Send events that have their ids already. Raises ConnectionError when the client is gone."""
    try:
        async with _Line(request) as line:
            async for piece in pieces:
                await line.write(piece)
    except ReaderLostError as error:
        _log.warning("stream of %s: %s: cut off", request.remote, error)
        _cut_off(request)
        raise
    finally:
        await pieces.aclose()
    return line.response


@web.middleware
async def resume_streams(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A call repeated with Last-Event-ID is no new call: it goes on with the stream that this event belongs to."""
    event_id = request.headers.get(LAST_EVENT_ID)
    if not event_id or request.method != "POST":
        return await handler(request)
    return await send_pieces(request, request.app[RESUMABLE_STREAMS].resume(event_id, request[CALLER].tenant))


class _Line:
    """The open reply. As a context manager: begins it, keeps it alive with comments, and ends it properly."""

    def __init__(self, request: web.Request) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self._request = request
        self._write_timeout = request.app[WRITE_TIMEOUT]
        self._interval = request.app[KEEP_ALIVE]
        self._loop = asyncio.get_running_loop()
        self._last_write = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Write; waits while the client is behind, but not for ever. Raises ConnectionError when it is gone."""
        self._last_write = self._loop.time()
        await self._bounded(self.response.write(data))

    async def _bounded(self, write: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._write_timeout):
                await write
        except TimeoutError:
            _log.warning("a client left its stream unread for %g s: cut off", self._write_timeout)
            _cut_off(self._request)
            raise ConnectionResetError("the client does not read") from None

    async def __aenter__(self) -> _Line:
        await self.response.prepare(self._request)
        if self._interval > 0:
            self._timer = self._loop.call_later(self._interval, self._keep_alive)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()
        if error is None:
            await self._bounded(self.response.write_eof())

    def _keep_alive(self) -> None:
        """A comment if nothing was sent for an interval: one timer a stream, so that no event bears its cost."""
        wait = self._last_write + self._interval - self._loop.time()
        if wait <= 0:
            wait = self._interval
            if self._comment is None or self._comment.done():  # else it waits for a client that is behind
                self._comment = asyncio.create_task(self._write_comment())
        self._timer = self._loop.call_later(wait, self._keep_alive)

    async def _write_comment(self) -> None:
        self._last_write = self._loop.time()
        try:
            await self.response.write(_KEEP_ALIVE_COMMENT)
        except ConnectionError:
            _log.debug("a client went away while its stream waited")  # the handler hears of it itself


def _cut_off(request: web.Request) -> None:
    if not client_is_gone(request) and request.transport is not None:
        request.transport.abort()
