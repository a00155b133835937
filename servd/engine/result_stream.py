"""What the caller of `generate` holds: outputs as they come, and the right to stop them.

Knows nothing of tokens or scheduling. A slow reader costs no memory but its own text: news is merged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from servd.outputs import RequestOutput


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
        self._news = asyncio.Event()
        self._closed = False

    def put(self, output: RequestOutput) -> None:
        """Called by the engine: add news of one answer."""
        waiting = self._pending.get(output.index)
        if waiting is None:
            self._pending[output.index] = output
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
        return self._pending.pop(next(iter(self._pending)))

    async def aclose(self) -> None:
        """Abort what is unfinished. Safe to call at any time, also twice."""
        if not self._closed:
            self._closed = True
            self._pending.clear()
            self._news.set()
            self._on_close()

    async def __aenter__(self) -> ResultStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
