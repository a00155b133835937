"""Writing to a gRPC stream whose client may not read.

Knows nothing of messages.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from servd.api.grpc.status import Context
from servd.errors import DeadlineExceededError


class TimedWriter:
    """Writes one message after another, and waits while the client is behind, but not for ever.

    As a context manager it watches with one timer a stream: no message bears the cost of it.
    """

    def __init__(self, context: Context, seconds: float) -> None:
        self._context = context
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._began = 0.0  # the write that runs
        self._writing: asyncio.Task[Any] | None = None  # who waits for it
        self._is_late = False
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, message: Any) -> None:
        """Write; by one task at a time.

        Raises DeadlineExceededError if it takes too long, so that the request is aborted; the client learns of it when
        it reads on.
        """
        self._began = self._loop.time()
        self._writing = task = asyncio.current_task()
        try:
            await self._context.write(message)
        except asyncio.CancelledError:
            if self._is_late and task is not None and task.uncancel() == 0:
                raise DeadlineExceededError(f"the client left its stream unread for {self._seconds:g} s") from None
            raise
        finally:
            self._writing = None

    def __enter__(self) -> TimedWriter:
        self._timer = self._loop.call_later(self._seconds, self._watch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        wait = self._seconds
        if self._writing is not None:
            wait = self._began + self._seconds - self._loop.time()
            if wait <= 0:
                self._is_late = True
                self._writing.cancel()
                return
        self._timer = self._loop.call_later(wait, self._watch)  # a write may begin at any time
