"""Requests in policy order. Knows the order, not what is done with it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from servd.request import Request
from servd.scheduler.policies import Policy


class RequestQueue:
    """A sorted list under the policy's key; ties go by insertion. Holds a few thousand requests at most."""

    def __init__(self, policy: Policy) -> None:
        self._key = policy.key
        self._count = 0
        self._entries: list[tuple[tuple[Any, ...], int, Request]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        """Iterate over a snapshot: the queue may change meanwhile."""
        return iter([request for _, _, request in self._entries])

    def add(self, request: Request) -> None:
        """Insert at the request's place."""
        self._count += 1
        insort(self._entries, (self._key(request), self._count, request), key=itemgetter(0, 1))

    def remove(self, request: Request) -> None:
        """Take a request out. It must be in the queue."""
        index = next(i for i, entry in enumerate(self._entries) if entry[2] is request)
        del self._entries[index]

    def last(self) -> Request:
        """The request that the policy puts last. The queue must not be empty."""
        return self._entries[-1][2]
