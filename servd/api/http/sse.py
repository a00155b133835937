"""OpenAI's events of one generating call: chunks, usage, errors in mid-stream, [DONE].

Serialises what all chunks share once; knows nothing of what a choice looks like, nor of connections.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web

from servd.api.http.errors import as_servd_error, error_json
from servd.api.http.event_stream import send_events
from servd.api.http.generation import Batch, Usage, close_streams, merge_batches
from servd.api.http.resumable_streams import EventSource
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

    A failure becomes an event with `error`, and the stream ends there, without [DONE]. Always closes the streams:
    what is unfinished is aborted.
    """
    source = _chunks(head, options, streams, n, render)
    return await send_events(request, str(head["id"]), source, reads=streams, resumable=options.resumable)


async def _chunks(
    head: dict[str, object],
    options: StreamOptions,
    streams: Sequence[ResultStream],
    n: int,
    render: RenderChoices,
) -> EventSource:
    frame = _ChunkFrame(head, options)
    usage = Usage(n)
    batches = merge_batches(streams, n)
    try:
        async for batch in batches:
            events, failure = _events(batch, frame, usage, render)
            if failure is not None:
                _log.warning("stream %s ends with an error: %s", head["id"], failure.code)
                yield [*events, _error_event(failure)]
                return
            if events:
                yield events
        yield [frame.usage_chunk(usage), DONE] if options.include_usage else [DONE]
    except Exception as error:
        _log.error("a stream failed", exc_info=error)
        yield [_error_event(as_servd_error(error))]
    finally:
        await close_streams(streams)
        await batches.aclose()


def _events(
    batch: Batch, frame: _ChunkFrame, usage: Usage, render: RenderChoices
) -> tuple[list[bytes], ServdError | None]:
    """A batch's events, up to the first failure."""
    events: list[bytes] = []
    for answer, output in batch:
        if output.error is not None:
            return events, output.error
        usage.count(answer, output)
        events.extend(frame.chunk(choice, usage) for choice in render(answer, output))
    return events, None


def _error_event(error: ServdError) -> bytes:
    return b"data: " + error_json(error) + b"\n\n"
