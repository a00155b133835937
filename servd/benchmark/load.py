"""Two ways to put load on a server: a fixed number at a time, or arrivals that wait for nobody.

Knows nothing of events and bodies (servd.benchmark.client).
"""

from __future__ import annotations

import asyncio
import datetime
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import aiohttp

from servd.benchmark.client import PATHS, LoadWatch, RequestOptions, ask, base_url
from servd.benchmark.requests import BenchRequest, freshen
from servd.benchmark.results import RequestRow, RunResult

Worker = Callable[[aiohttp.ClientSession], Coroutine[Any, Any, None]]
DEFAULT_OPTIONS = RequestOptions()


async def run_closed_loop(
    url: str,
    model: str,
    requests: Sequence[BenchRequest],
    concurrency: int,
    *,
    options: RequestOptions = DEFAULT_OPTIONS,
    salt: int | None = None,
    watch: LoadWatch | None = None,
) -> RunResult:
    """Keep `concurrency` requests under way until all are answered.

    First tokens are made fresh by `salt` (by default a random one, see `freshen`). Failures are rows, never raised.
    """
    run = _Run(url, model, requests, options, salt, watch)

    async def worker(session: aiohttp.ClientSession) -> None:
        while run.queue:
            await run.send(session, run.queue.pop())

    return await run.finish(f"c={concurrency}", [worker] * min(concurrency, len(requests)))


async def run_open_loop(
    url: str,
    model: str,
    requests: Sequence[BenchRequest],
    *,
    load: str = "arrivals",
    options: RequestOptions = DEFAULT_OPTIONS,
    salt: int | None = None,
    watch: LoadWatch | None = None,
) -> RunResult:
    """Send each request at its `arrival_s`, whatever became of the others; `load` names the run.

    Clocks start at the planned arrival: a client or a queue that is late is counted, not forgiven.
    """
    run = _Run(url, model, sorted(requests, key=lambda request: request.arrival_s), options, salt, watch)

    async def sender(session: aiohttp.ClientSession) -> None:
        async with asyncio.TaskGroup() as tasks:
            while run.queue:
                planned = run.queue.pop()
                due = run.origin + planned[0].arrival_s
                await asyncio.sleep(max(due - time.perf_counter(), 0))
                run.max_delay = max(run.max_delay, time.perf_counter() - due)
                tasks.create_task(run.send(session, planned, due))

    return await run.finish(load, [sender])


class _Run:
    """The requests of a run that are still to be sent, and the rows of those that ended."""

    def __init__(
        self,
        url: str,
        model: str,
        requests: Sequence[BenchRequest],
        options: RequestOptions,
        salt: int | None,
        watch: LoadWatch | None,
    ) -> None:
        self.salt = secrets.randbits(32) if salt is None else salt
        self.url = base_url(url) + PATHS[options.endpoint]
        self.options = options
        self.watch = watch or LoadWatch()
        self.watch.total = len(requests)
        fresh = freshen(requests, self.salt)
        self.queue = [(request, options.body(model, request)) for request in reversed(fresh)]
        self.rows: list[RequestRow] = []
        self.origin = 0.0
        self.max_delay = 0.0

    async def send(
        self, session: aiohttp.ClientSession, planned: tuple[BenchRequest, bytes], due: float | None = None
    ) -> None:
        """Send a request of the queue, taken off it, and keep its row."""
        request, body = planned
        self.rows.append(await ask(session, self.url, body, request, self.watch, self.origin, due))

    async def finish(self, load: str, workers: Sequence[Worker]) -> RunResult:
        """Let the workers empty the queue; what came of it, in the order of starts."""
        started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        async with self.options.session() as session:
            cpu = time.process_time()
            self.origin = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for worker in workers:
                    tasks.create_task(worker(session))
            wall = time.perf_counter() - self.origin
            cpu = time.process_time() - cpu
        self.rows.sort(key=lambda row: row.start_s)
        return RunResult(
            load=load, salt=self.salt, started_at=started_at, wall_s=wall, client_cpu_s=cpu,
            max_send_delay_ms=self.max_delay * 1e3, rows=self.rows,
        )  # fmt: skip
