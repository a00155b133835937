"""Responses that are kept for later: to be read again, followed, cancelled, deleted, or gone on from.

In memory, bounded for each tenant by number, bytes and age; what runs in the background is never dropped. Knows nothing
of bodies or connections.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from servd.api.conversation import MAX_MESSAGES
from servd.api.http.responses.answer import ResponseAnswer
from servd.api.http.responses.items import Item
from servd.api.http.resumable_streams import EventLog, EventSource
from servd.engine.result_stream import ResultStream
from servd.errors import InvalidRequestError, NotFoundError, OverloadedError

MAX_RESPONSES = 1024
MAX_BYTES = 64 << 20
MAX_SECONDS = 24 * 3600.0


class ResponseNotFoundError(NotFoundError):
    """No such response is kept for this tenant."""

    code = "response_not_found"


@dataclass(slots=True)
class StoredResponse:
    """One response. Its parts are kept as JSON: their size is known, and nobody changes them."""

    id: str
    previous_id: str | None
    input_items: bytes
    reply: bytes = b""  # once it is complete
    output_items: bytes = b"[]"
    stored_at: float = field(default_factory=time.monotonic)
    run: BackgroundRun | None = None

    @property
    def is_running(self) -> bool:
        """Whether its answer still grows."""
        return self.run is not None and not self.run.answer.is_over

    @property
    def num_bytes(self) -> int:
        """What it holds."""
        log = 0 if self.run is None else self.run.log.num_bytes
        return len(self.input_items) + len(self.reply) + len(self.output_items) + log

    def complete(self, answer: ResponseAnswer) -> None:
        """Take in the end of the answer."""
        self.reply = msgspec.json.encode(answer.as_dict())
        self.output_items = msgspec.json.encode(answer.output)

    def as_json(self) -> bytes:
        """The response as it stands."""
        return self.reply or (b"" if self.run is None else msgspec.json.encode(self.run.answer.as_dict()))


class BackgroundRun:
    """A response that is made without a client: its events are kept, and it can be cancelled."""

    def __init__(self, answer: ResponseAnswer, stream: ResultStream, tenant: str) -> None:
        self.answer = answer
        self.log = EventLog(answer.id, tenant, lambda reading: None)
        self._stream = stream
        self._task: asyncio.Task[None] | None = None

    def start(self, source: EventSource) -> None:
        """Begin to read the answer."""
        self._task = asyncio.create_task(self.log.fill(source), name=f"background {self.answer.id}")

    async def cancel(self) -> None:
        """End it, and wait until it has ended."""
        self.answer.is_unwanted = True
        await self._stream.aclose()
        if self._task is not None:
            await asyncio.wait([self._task])

    def events_after(self, sequence_number: int) -> AsyncGenerator[bytes, None]:
        """The events that follow, as they come. Raises InvalidRequestError for those no longer kept, or not there."""
        try:
            return self.log.after(sequence_number + 1)
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"starting_after is {sequence_number}: {error.message} (counted from 1)", param="starting_after"
            ) from None


class ResponseStore:
    """All responses that are kept. The bounds are each tenant's; the oldest go first. `max_age` in seconds."""

    def __init__(
        self, *, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES, max_age: float = MAX_SECONDS
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self.max_age = max_age
        self._tenants: dict[str, OrderedDict[str, StoredResponse]] = {}

    def add(self, tenant: str, stored: StoredResponse) -> None:
        """Keep a response. Raises OverloadedError if there is no room beside those that run."""
        kept = self._tenants.setdefault(tenant, OrderedDict())
        stored.stored_at = time.monotonic()
        kept[stored.id] = stored
        self._drop_old()
        self._drop_excess(kept)
        running = [other for other in kept.values() if other.is_running]
        num_bytes = sum(other.num_bytes for other in running)
        if stored.id not in kept or len(running) > self._max_responses or num_bytes > self._max_bytes:
            kept.pop(stored.id, None)
            raise OverloadedError(
                f"no room for response {stored.id!r} beside {len(running)} that run, of {num_bytes} bytes; allowed: "
                f"{self._max_responses} responses, {self._max_bytes} bytes"
            )

    def _is_old(self, stored: StoredResponse) -> bool:
        return stored.stored_at < time.monotonic() - self.max_age and not stored.is_running

    def _drop_old(self) -> None:
        for kept in self._tenants.values():  # also of tenants that do not come any more
            for stored in list(itertools.takewhile(self._is_old, kept.values())):
                del kept[stored.id]

    def _drop_excess(self, kept: OrderedDict[str, StoredResponse]) -> None:
        num_bytes = sum(stored.num_bytes for stored in kept.values())
        for stored in list(kept.values()):
            if len(kept) <= self._max_responses and num_bytes <= self._max_bytes:
                return
            if not stored.is_running:
                num_bytes -= stored.num_bytes
                del kept[stored.id]

    def get(self, tenant: str, response_id: str, *, param: str = "response_id") -> StoredResponse:
        """The response of that id. Raises ResponseNotFoundError, also for another tenant's."""
        stored = self._tenants.get(tenant, OrderedDict()).get(response_id)
        if stored is None or self._is_old(stored):
            raise ResponseNotFoundError(f"{param} is {response_id[:100]!r}; no such response is kept", param=param)
        return stored

    def remove(self, tenant: str, response_id: str) -> StoredResponse:
        """Forget a response. Raises ResponseNotFoundError."""
        stored = self.get(tenant, response_id)
        del self._tenants[tenant][response_id]
        return stored

    def history(self, tenant: str, response_id: str | None) -> list[Item]:
        """Input and output of a response and of those that it went on from, oldest first.

        Raises ResponseNotFoundError if one of them is not kept any more, InvalidRequestError for one that is not
        complete, or too many.
        """
        chain: list[list[Item]] = []
        param, num_items = "previous_response_id", 0
        while response_id is not None:
            stored = self.get(tenant, response_id, param=param)
            if not stored.reply:
                raise InvalidRequestError(
                    f"{param} is {response_id[:100]!r}, which is not complete; allowed: one that is", param=param
                )
            chain.append(_decode(stored.input_items) + _decode(stored.output_items))
            num_items += len(chain[-1])
            if num_items > MAX_MESSAGES:
                raise InvalidRequestError(
                    f"{param} leads to {num_items} items and more; allowed: {MAX_MESSAGES}", param=param
                )
            response_id = stored.previous_id
        return [item for items in reversed(chain) for item in items]

    async def close(self) -> None:
        """End all that runs."""
        for kept in self._tenants.values():
            for stored in list(kept.values()):
                if stored.run is not None:
                    await stored.run.cancel()


def _decode(items: bytes) -> list[Item]:
    return msgspec.json.decode(items, type=list[dict[str, Any]])
