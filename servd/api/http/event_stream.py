"""One stream of server-sent events to one client: numbered, kept alive while it waits, cut off when it is not read.

Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType

from aiohttp import web
from aiohttp.typedefs import Handler

from servd.api.http.context import CALLER, KEEP_ALIVE, RESUMABLE_STREAMS, WRITE_TIMEOUT
from servd.api.http.middleware import client_is_gone
from servd.api.http.resumable_streams import LAST_EVENT_ID, EventSource, ReaderLostError
from servd.engine.result_stream import ResultStream
from servd.errors import UnsupportedError

_KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_log = logging.getLogger("servd.http")


async def send_events(
    request: web.Request,
    stream_id: str,
    source: EventSource,
    *,
    reads: Sequence[ResultStream] = (),
    resumable: bool = False,
) -> web.StreamResponse:
    """Send a source's events as they come, the n-th with the id 'STREAM_ID:n'; then close the source.

    `reads`: what the source reads and closes; closed here if it never began, for then it closes nothing.

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
            await _close(source, reads)
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
        await _close(source, reads)
    return line.response


async def _close(source: EventSource, reads: Sequence[ResultStream]) -> None:
    for stream in reads:
        await stream.aclose()
    await source.aclose()


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
    """The open reply. As a context manager: begins it, watches over it, and ends it properly.

    One timer a stream sends comments while nothing else is sent, and cuts off a client that does not read: no event
    bears the cost of either.
    """

    def __init__(self, request: web.Request) -> None:
        self.response = web.StreamResponse(headers=_HEADERS)
        self._request = request
        self._write_timeout = request.app[WRITE_TIMEOUT]
        self._interval = request.app[KEEP_ALIVE] or math.inf
        self._loop = asyncio.get_running_loop()
        self._last_write = self._loop.time()  # when the latest began
        self._is_writing = False
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Write; waits while the client is behind, but not for ever. Raises ConnectionError when it is gone."""
        self._last_write = self._loop.time()
        self._is_writing = True
        await self.response.write(data)
        self._is_writing = False

    async def __aenter__(self) -> _Line:
        await self.response.prepare(self._request)
        self._watch()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._last_write = self._loop.time()
                self._is_writing = True
                await self.response.write_eof()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if self._comment is not None:
                self._comment.cancel()

    def _watch(self) -> None:
        quiet = self._loop.time() - self._last_write
        limit = self._write_timeout if self._is_writing else self._interval
        if quiet >= limit and self._is_writing:
            _log.warning("a client left its stream unread for %g s: cut off", self._write_timeout)
            _cut_off(self._request)  # the write fails, and the handler with it
            return
        if quiet >= limit:
            self._comment = asyncio.create_task(self._write_comment())
            quiet = 0.0
        # A write may begin at any time, and the interval too.
        wait = min(limit - quiet, self._write_timeout, self._interval)
        self._timer = self._loop.call_later(wait, self._watch)

    async def _write_comment(self) -> None:
        try:
            await self.write(_KEEP_ALIVE_COMMENT)
        except ConnectionError:
            _log.debug("a client went away while its stream waited")  # the handler hears of it itself


def _cut_off(request: web.Request) -> None:
    if not client_is_gone(request) and request.transport is not None:
        request.transport.abort()
