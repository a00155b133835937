"""A whole benchmark: every load, repeated, after a warm-up.

Knows nothing of flags or terminals.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from servd.benchmark.arrivals import arrive_at_rate
from servd.benchmark.client import LoadWatch, RequestOptions
from servd.benchmark.load import run_closed_loop, run_open_loop
from servd.benchmark.requests import BenchRequest
from servd.benchmark.results import RunResult
from servd.benchmark.server import Server

WARMUP_CONCURRENCY = 4


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop if `concurrency` is set, `rate` arrivals a second if that is, else the requests' own arrivals."""

    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0  # see arrive_at_rate

    @property
    def name(self) -> str:
        """What results call it."""
        if self.concurrency is not None:
            return f"c={self.concurrency}"
        return f"{self.rate:g} req/s" if self.rate is not None else "trace"


class Display(Protocol):
    """What shows a run while it goes on."""

    def __call__(self, what: str, watch: LoadWatch) -> AbstractAsyncContextManager[None]:
        """Entered before the run, left after it."""


@dataclass(frozen=True, slots=True)
class Session:
    """One server, one set of requests."""

    server: Server
    requests: Sequence[BenchRequest]
    options: RequestOptions
    display: Display
    seed: int = 0
    salt: int | None = None  # of the first run, the next has one more; None draws one for each

    async def warm_up(self, num_requests: int) -> None:
        """Send some requests that no result will count."""
        requests = self.requests[:num_requests]
        if requests:
            await self._watched("warm-up", Load(concurrency=WARMUP_CONCURRENCY), requests, None)

    async def run(self, loads: Sequence[Load], repeat: int) -> AsyncIterator[RunResult]:
        """Each run as it ends. All loads take turns, so that a machine that drifts does so under each of them."""
        count = 0
        for repetition in range(repeat):
            for load in loads:
                what = load.name if repeat == 1 else f"{load.name}, {repetition + 1} of {repeat}"
                salt = None if self.salt is None else self.salt + count
                result = await self._watched(what, load, self.requests, salt)
                result.repetition = repetition
                count += 1
                yield result

    async def _watched(
        self, what: str, load: Load, requests: Sequence[BenchRequest], salt: int | None
    ) -> RunResult:
        watch = LoadWatch()
        url, model, options = self.server.url, self.server.model, self.options
        async with self.display(what, watch):
            if load.concurrency is not None:
                return await run_closed_loop(
                    url, model, requests, load.concurrency, options=options, salt=salt, watch=watch
                )
            if load.rate is not None:
                requests = arrive_at_rate(requests, load.rate, burstiness=load.burstiness, seed=self.seed)
            return await run_open_loop(url, model, requests, load=load.name, options=options, salt=salt, watch=watch)
