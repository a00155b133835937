"""What the caller of `generate` holds: outputs as they come, and the right to stop them.

Knows nothing of tokens or scheduling. A slow reader costs no memory but its own text: news is merged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from servd.outputs import RequestOutput

UNREAD_SECONDS = 0.05  # more than that, and the reader is slow


class Sink(Protocol):
    """Who takes the news of answers."""

    def put(self, output: RequestOutput) -> None:
        """Add news of one answer."""


class ResultStream:
    """Async iterator over the RequestOutputs of a request's `n` answers; ends when each has a finish reason.

    One consumer, on the engine's event loop. `aclose()`, or leaving it as a context manager, aborts what is
    unfinished; call it in a `finally`, so that a consumer that is cancelled or fails leaves nothing running.
    """

    def __init__(self, num_answers: int, on_close: Callable[[], object]) -> None:
        self._unfinished = num_answers
        self._on_close = on_close
        self._pending: dict[int, RequestOutput] = {}  # by answer
        self._since: dict[int, float] = {}  # when each became pending
        self._news = asyncio.Event()
        self._closed = False
        # Told of each output as it is made: also what nobody reads costs its computation.
        self.on_output: Callable[[RequestOutput], None] | None = None
        # Told of news that was not fetched for UNREAD_SECONDS: the answer, since when, and how long.
        self.on_unread: Callable[[int, float, float], None] | None = None

    def put(self, output: RequestOutput) -> None:
        """Called by the engine: add news of one answer."""
        if self.on_output is not None:
            self.on_output(output)
        if self._closed:
            return  # nobody will fetch it, and the request's record outlives the stream
        waiting = self._pending.get(output.index)
        if waiting is None:
            self._pending[output.index] = output
            self._since[output.index] = time.monotonic()
        else:
            waiting.merge(output)
        if output.finish_reason is not None:
            self._unfinished -= 1
        self._news.set()

    def __aiter__(self) -> ResultStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._pending:
            if self._unfinished == 0 or self._closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        index = next(iter(self._pending))
        self._fetched(index)
        return self._pending.pop(index)

    def unread_since(self, index: int) -> float | None:
        """Since when news of an answer waits to be fetched (time.monotonic()); None: nothing does."""
        return self._since.get(index)

    def _fetched(self, index: int) -> None:
        since = self._since.pop(index)
        seconds = time.monotonic() - since
        if seconds > UNREAD_SECONDS and self.on_unread is not None:
            self.on_unread(index, since, seconds)

    async def aclose(self) -> None:
        """Abort what is unfinished. Safe to call at any time, also twice."""
        if not self._closed:
            self._closed = True
            for index in self._pending:
                self._fetched(index)
            self._pending.clear()
            self._news.set()
            self._on_close()

    async def __aenter__(self) -> ResultStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
