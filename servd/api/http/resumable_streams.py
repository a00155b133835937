"""Streams that outlive their connection for a while: events are kept, and sent on from where the client lost them.

Owns the kept events, their bounds and their time. Knows nothing of connections, nor of what the events say.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

from servd.errors import InvalidRequestError, NotFoundError, OverloadedError

EventSource = AsyncGenerator[Sequence[bytes], None]
"""Yields events that are ready together, each whole (b"data: …\\n\\n", or with an `event:` line before).

Closing it aborts what it reads from. It must not raise: the status line is gone by the time it is read, so that an
event is the only way left to tell of an error.
"""

LAST_EVENT_ID = "Last-Event-ID"
MAX_STREAMS = 1024
STREAM_BYTES = 4 << 20  # of one stream's events; the oldest go first

_log = logging.getLogger("servd.http")


class ReaderLostError(ConnectionResetError):
    """Another connection reads this stream now, or this one was too slow for what is kept."""


class EventLog:
    """The numbered events of one stream. At most one reader: the latest to come takes the place of the one before."""

    def __init__(self, stream_id: str, tenant: str, on_reader: Callable[[bool], None]) -> None:
        self.tenant = tenant
        self.num_bytes = 0
        self._prefix = f"id: {stream_id}:".encode()
        self._on_reader = on_reader
        self._events: deque[bytes] = deque()
        self._last_number = 0
        self._finished = False
        self._reader = 0
        self._news = asyncio.Event()

    async def fill(self, source: EventSource) -> None:
        """Keep all that the source yields, and close it."""
        try:
            async for events in source:
                self._append(events)
        finally:
            self._finished = True
            self._tell()
            await source.aclose()

    def after(self, number: int) -> AsyncGenerator[bytes, None]:
        """All events later than the `number`-th, those ready together in one piece.

        Raises InvalidRequestError for events that are no longer kept, or not there yet; ReaderLostError while read.
        """
        if not self._num_dropped <= number <= self._last_number:
            raise InvalidRequestError(
                f"{LAST_EVENT_ID} asks for what follows event {number}; kept here: events {self._num_dropped + 1} to "
                f"{self._last_number}",
                param=LAST_EVENT_ID,
            )
        return self._read(number)

    async def _read(self, number: int) -> AsyncGenerator[bytes, None]:
        self._reader = reader = self._reader + 1
        self._tell()  # the reader before this one
        self._on_reader(True)
        try:
            while True:
                if self._reader != reader:
                    raise ReaderLostError("another connection reads this stream now")
                if number < self._num_dropped:
                    raise ReaderLostError("the client is too slow for what is kept of its resumable stream")
                if number < self._last_number:
                    ready = itertools.islice(self._events, number - self._num_dropped, None)
                    number = self._last_number
                    yield b"".join(ready)
                elif self._finished:
                    return
                else:
                    await self._news.wait()
        finally:
            if self._reader == reader:
                self._on_reader(False)

    @property
    def _num_dropped(self) -> int:
        return self._last_number - len(self._events)

    def _append(self, events: Sequence[bytes]) -> None:
        for event in events:
            self._last_number += 1
            numbered = b"%b%d\n%b" % (self._prefix, self._last_number, event)
            self._events.append(numbered)
            self.num_bytes += len(numbered)
        while self.num_bytes > STREAM_BYTES and len(self._events) > 1:
            self.num_bytes -= len(self._events.popleft())
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class ResumableStreams:
    """All resumable streams of a server. One without a reader for `seconds` is aborted, or forgotten if it is done.

    `max_bytes` bounds what is kept of all; a new stream is refused beyond it.
    """

    def __init__(self, seconds: float, max_bytes: int) -> None:
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._logs: OrderedDict[str, EventLog] = OrderedDict()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._expiries: dict[str, asyncio.TimerHandle] = {}

    @property
    def enabled(self) -> bool:
        """Whether streams can be resumed at all."""
        return self._seconds > 0

    def start(self, stream_id: str, tenant: str, source: EventSource) -> EventLog:
        """Read the source in the background. Raises OverloadedError when too many streams or bytes are kept."""
        num_bytes = sum(log.num_bytes for log in self._logs.values())
        if len(self._logs) >= MAX_STREAMS or num_bytes >= self._max_bytes:
            raise OverloadedError(
                f"{len(self._logs)} resumable streams hold {num_bytes} bytes; allowed: {MAX_STREAMS} streams, "
                f"{self._max_bytes} bytes",
                retry_after=self._seconds,
            )
        log = EventLog(stream_id, tenant, partial(self._on_reader, stream_id))
        self._logs[stream_id] = log
        self._tasks[stream_id] = asyncio.create_task(log.fill(source), name=f"resumable {stream_id}")
        self._on_reader(stream_id, False)
        return log

    def resume(self, event_id: str, tenant: str) -> AsyncGenerator[bytes, None]:
        """The events after the one with this id, 'STREAM_ID:n'.

        Raises NotFoundError for a stream that is not kept (or is another tenant's), InvalidRequestError for a
        malformed id or events that are gone.
        """
        stream_id, _, number = event_id.rpartition(":")
        if not stream_id or not (number.isascii() and number.isdecimal() and len(number) < 12):
            raise InvalidRequestError(
                f"{LAST_EVENT_ID} is {event_id[:200]!r}; allowed: the id of an event, as in 'chatcmpl-…:17'",
                param=LAST_EVENT_ID,
            )
        log = self._logs.get(stream_id)
        if log is None or log.tenant != tenant:
            raise NotFoundError(
                f"no stream {stream_id[:200]!r} is kept; only those asked for with stream_options.resumable are, "
                f"and for {self._seconds:g} s without a reader",
                param=LAST_EVENT_ID,
            )
        return log.after(int(number))

    async def close(self) -> None:
        """Abort all streams."""
        for expiry in self._expiries.values():
            expiry.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._logs.clear()

    def _on_reader(self, stream_id: str, reading: bool) -> None:
        expiry = self._expiries.pop(stream_id, None)
        if expiry is not None:
            expiry.cancel()
        if not reading and stream_id in self._logs:
            loop = asyncio.get_running_loop()
            self._expiries[stream_id] = loop.call_later(self._seconds, self._expire, stream_id)

    def _expire(self, stream_id: str) -> None:
        del self._logs[stream_id], self._expiries[stream_id]
        if self._tasks.pop(stream_id).cancel():
            _log.info("stream %s was not resumed within %g s: aborted", stream_id, self._seconds)
