"""Server-sent events of one generating call: chunks, usage, errors in mid-stream, [DONE].

Serialises what all chunks share once; knows nothing of what a choice looks like.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web

from servd.api.http.context import WRITE_TIMEOUT
from servd.api.http.errors import as_servd_error, error_json
from servd.api.http.generation import Batch, Usage, close_streams, merge_batches
from servd.api.http.middleware import client_is_gone
from servd.api.http.schema import StreamOptions
from servd.engine.result_stream import ResultStream
from servd.errors import ServdError
from servd.outputs import RequestOutput

RenderChoices = Callable[[int, RequestOutput], list[bytes]]
"""(answer, its news) → JSON texts of `choices` entries, each to be a chunk of its own."""

DONE = b"data: [DONE]\n\n"
_log = logging.getLogger("servd.http")


class _ChunkFrame:
    """A chunk's JSON around its choices: the head is encoded once a stream."""

    def __init__(self, head: dict[str, object], options: StreamOptions) -> None:
        self._before = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"
        self._each_with_usage = options.continuous_usage_stats

    def chunk(self, choice: bytes, usage: Usage) -> bytes:
        """A chunk with one choice."""
        if self._each_with_usage:
            return self._with_usage(choice, usage)
        return self._before + choice + self._after

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last chunk of `include_usage`: no choices."""
        return self._with_usage(b"", usage)

    def _with_usage(self, choice: bytes, usage: Usage) -> bytes:
        return self._before + choice + b'],"usage":' + msgspec.json.encode(usage.as_dict()) + b"}\n\n"


async def stream_reply(
    request: web.Request,
    head: dict[str, object],
    options: StreamOptions,
    streams: Sequence[ResultStream],
    n: int,
    render: RenderChoices,
) -> web.StreamResponse:
    """Send the streams' answers as they come; `head` is what all chunks share.

    A failure becomes an event with `error`, and the stream ends there, without [DONE]. A client that leaves its
    events unread for `WRITE_TIMEOUT` seconds is cut off. Always closes the streams: what is unfinished is aborted.
    """
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
    frame = _ChunkFrame(head, options)
    usage = Usage(n)
    batches = merge_batches(streams, n)
    try:
        await response.prepare(request)
        async for batch in batches:
            events, failure = _events(batch, frame, usage, render)
            if failure is not None:
                _log.warning("stream %s ends with an error: %s", head["id"], failure.code)
                await _send(request, response, events + _error_event(failure), last=True)
                break
            if events:
                await _send(request, response, events)
        else:
            end = frame.usage_chunk(usage) if options.include_usage else b""
            await _send(request, response, end + DONE, last=True)
    except Exception as error:
        if isinstance(error, ConnectionError) and client_is_gone(request):
            raise
        # The status line is gone already: an event is the only way left to tell.
        _log.error("a stream failed", exc_info=error)
        await _send(request, response, _error_event(as_servd_error(error)), last=True)
    finally:
        # First, and without a pause: the handler may be cancelled at its next one, while it is already on its way out.
        await close_streams(streams)
        await batches.aclose()
    return response


def _events(
    batch: Batch, frame: _ChunkFrame, usage: Usage, render: RenderChoices
) -> tuple[bytes, ServdError | None]:
    """All of a batch as one piece of bytes, up to the first failure."""
    events: list[bytes] = []
    for answer, output in batch:
        if output.error is not None:
            return b"".join(events), output.error
        usage.count(answer, output)
        events.extend(frame.chunk(choice, usage) for choice in render(answer, output))
    return b"".join(events), None


def _error_event(error: ServdError) -> bytes:
    return b"data: " + error_json(error) + b"\n\n"


async def _send(request: web.Request, response: web.StreamResponse, data: bytes, *, last: bool = False) -> None:
    """Write; waits while the client is behind, but not for ever. Raises ConnectionError when it is gone."""
    seconds = request.app[WRITE_TIMEOUT]
    try:
        async with asyncio.timeout(seconds):
            await response.write(data)
            if last:
                await response.write_eof()
    except TimeoutError:
        _log.warning("a client left its stream unread for %g s: cut off", seconds)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client does not read") from None
