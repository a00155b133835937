"""When to try again after the workers died, and when to give up. Knows nothing of requests: the scheduler replays."""

from __future__ import annotations

import time
from collections import deque

WINDOW_SECONDS = 600.0


class RestartBudget:
    """At most `max_restarts` worker restarts within ten minutes; a server that restarts for ever only looks alive."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self._times: deque[float] = deque()

    def take(self) -> bool:
        """Whether one more restart is allowed now; counts it if so."""
        now = time.monotonic()
        while self._times and now - self._times[0] > WINDOW_SECONDS:
            self._times.popleft()
        if len(self._times) >= self.max_restarts:
            return False
        self._times.append(now)
        return True
