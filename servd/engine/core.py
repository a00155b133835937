"""The engine loop: plan a step, submit it, take in the oldest one's result, recover from lost workers.

Knows nothing of text or transports. One asyncio task runs it; scheduler and cache are touched on that loop alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from servd.engine.recovery import RestartBudget
from servd.engine.request_log import RequestLog
from servd.errors import ServdError, WorkerDied
from servd.executor.base import Executor
from servd.metrics import Metrics
from servd.outputs import ModelRunnerOutput, ScheduledRequests, SchedulerOutput
from servd.request import FinishReason
from servd.scheduler.plan import Update
from servd.scheduler.scheduler import Scheduler

logger = logging.getLogger("servd.engine")
step_logger = logging.getLogger("servd.steps")

FIRST_STEP_FACTOR = 5  # a new worker may compile, or read weights from a cold disk, in its first step
MAX_STEP_RECORDS = 512
MAX_STEPS_IN_FLIGHT = 2  # one being computed, one waiting, so that the worker never waits for the planner


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step held, for the step log."""

    step_id: int
    num_reqs: int
    num_prefill_tokens: int  # tokens of prompt chunks (and of recomputation)
    num_decode_tokens: int  # single tokens of running answers
    num_draft_tokens: int  # guessed behind them
    num_accepted_tokens: int  # of these, the ones that were right
    num_waiting: int
    compute_seconds: float
    end_time: float  # time.monotonic() seconds
    plan: ScheduledRequests  # what each request computed
    sampled_request_ids: list[str]  # those whose drafts the next field counts
    num_accepted_by_request: list[int]  # empty: none


class EngineCore:
    """Drives the scheduler and the executor until `stop()`."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        metrics: Metrics,
        request_log: RequestLog,
        *,
        on_updates: Callable[[list[Update]], list[str]],
        on_state: Callable[[str, ServdError | None], None],
        max_restarts: int,
        step_timeout: float = 0.0,
        log_steps: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.step_log: deque[StepRecord] = deque(maxlen=MAX_STEP_RECORDS)
        self._executor = executor
        self._metrics = metrics
        self._request_log = request_log
        scheduler.on_stopped = request_log.stopped
        self._on_updates = on_updates  # returns the requests that a stop string ended
        self._on_state = on_state
        self._restarts = RestartBudget(max_restarts)
        self._step_timeout = step_timeout  # seconds; 0: none
        self._progress_time = 0.0  # when the oldest step in flight came to be that
        self._has_computed = False  # the workers that run now have
        self._log_steps = log_steps
        self._inflight: deque[tuple[SchedulerOutput, asyncio.Future[ModelRunnerOutput]]] = deque()
        self._wake = asyncio.Event()
        self._idle_loss: WorkerDied | None = None
        executor.on_idle_death = self._workers_died_idle
        self._counted = (0, 0, 0)  # preemptions, prefix queries, prefix hits already in the metrics

    def wake(self) -> None:
        """Something changed: a request came or went, or a step ended."""
        self._wake.set()

    async def run(self) -> None:
        """The loop. Ends only by cancellation, or when the workers cannot be brought back."""
        while True:
            lost = self._collect() or self._idle_loss or await self._killed_if_hung()
            self._idle_loss = None
            if lost is not None and not await self._recover(lost):
                return
            self._fill()
            await self._wait()
            self._wake.clear()

    async def _wait(self) -> None:
        """Until something changes, or the oldest step in flight has taken too long."""
        patience = self._patience()
        if patience is None:
            await self._wake.wait()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, patience)):
                await self._wake.wait()

    def _patience(self) -> float | None:
        """Seconds that the oldest step in flight has left; None: all the time in the world."""
        if not self._inflight or not self._step_timeout:
            return None
        limit = self._step_timeout * (1 if self._has_computed else FIRST_STEP_FACTOR)
        return self._progress_time + limit - time.monotonic()

    async def _killed_if_hung(self) -> WorkerDied | None:
        patience = self._patience()
        if patience is None or patience > 0:
            return None
        problem = f"no step was computed for {self._step_timeout:g} s (--step-timeout)"
        if await self._executor.kill():
            return WorkerDied(f"{problem}: the worker was killed")
        logger.warning("%s; such a worker cannot be killed, and is no longer watched", problem)
        self._step_timeout = 0.0
        return None

    def _fill(self) -> None:
        """Keep the worker fed: submit plans until enough are in flight or nothing more can be planned."""
        while len(self._inflight) < MAX_STEPS_IN_FLIGHT:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            if not self._inflight:
                self._progress_time = time.monotonic()
            future = self._executor.submit(plan)
            self._request_log.planned(plan, self.scheduler.waiting_for)
            future.add_done_callback(self._step_done)
            self._inflight.append((plan, future))
        self._request_log.waits_for(self.scheduler.waiting_for)
        self._count_scheduler()

    def _workers_died_idle(self, error: WorkerDied) -> None:
        self._idle_loss = error
        self._wake.set()

    def _step_done(self, future: asyncio.Future[ModelRunnerOutput]) -> None:
        self._wake.set()
        if not future.cancelled():
            future.exception()  # seen, also if the step is abandoned by then: asyncio need not report it

    def _collect(self) -> Exception | None:
        """Take in the finished steps, oldest first. Returns what went wrong, if a step was lost."""
        while self._inflight and self._inflight[0][1].done():
            plan, future = self._inflight[0]
            if future.cancelled():
                return WorkerDied("a step was cancelled")
            error = future.exception()
            if isinstance(error, Exception):
                return error
            self._inflight.popleft()
            self._progress_time, self._has_computed = time.monotonic(), True
            output = future.result()
            self._record(plan, output)
            updates = self.scheduler.update_from_output(output)
            self._request_log.stepped(plan, output, updates)
            stopped = self._on_updates(updates)
            for request_id in stopped:
                self.scheduler.finish(request_id, FinishReason.STOP)
        return None

    async def _recover(self, error: Exception) -> bool:
        """Replay everything after a lost step, on new workers if the old ones died. False if that is hopeless."""
        self._inflight.clear()
        workers_lost = isinstance(error, WorkerDied)
        logger.error("%s: %s", "the worker is lost and is restarted" if workers_lost else "a step is replayed", error)
        self._request_log.steps_lost(workers_lost=workers_lost)
        self._on_updates(self.scheduler.recover(workers_lost=workers_lost))
        if workers_lost:
            self._has_computed = False
            self._on_state("recovering", None)
            if not await self._restart():
                failure = WorkerDied(f"the model workers keep dying: {error}")
                self._on_state("dead", failure)
                return False
            self._on_state("ready", None)
        return True

    async def _restart(self) -> bool:
        pause = 0.0
        while self._restarts.take():
            await asyncio.sleep(pause)
            pause = min(2 * pause + 0.5, 5.0)  # seconds: what fails for a moment must not use up all tries at once
            self._metrics.worker_restarts.inc()
            try:
                info = await self._executor.start()
            except (ServdError, OSError) as error:
                logger.error("worker restart failed: %s", error)
            else:
                self.scheduler.cache.resize(info.num_blocks)
                return True
        return False

    def _record(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> None:
        counts = plan.scheduled.num_scheduled_tokens
        num_decode = sum(1 for n in counts if n == 1)
        record = StepRecord(
            plan.step_id, len(counts), sum(counts) - num_decode, num_decode, output.num_draft_tokens,
            sum(output.num_accepted_tokens), len(self.scheduler.waiting), output.compute_seconds, time.monotonic(),
            plan.scheduled, output.request_ids, output.num_accepted_tokens,
        )  # fmt: skip
        self.step_log.append(record)
        self._metrics.step_time.observe(output.compute_seconds)
        self._metrics.spec_drafted_tokens.inc(record.num_draft_tokens)
        self._metrics.spec_accepted_tokens.inc(record.num_accepted_tokens)
        if output.kv_shadow is not None:
            self._metrics.kv_shadow_kl.observe(output.kv_shadow.kl_divergence)
            self._metrics.kv_shadow_top1_equal.inc(output.kv_shadow.is_top1_equal)
        if self._log_steps:
            step_logger.info(
                "step %d: %d requests, %d prefill + %d decode tokens, %d of %d drafts right, %d waiting, %.1f ms",
                record.step_id, record.num_reqs, record.num_prefill_tokens, record.num_decode_tokens,
                record.num_accepted_tokens, record.num_draft_tokens, record.num_waiting, 1000 * record.compute_seconds,
            )  # fmt: skip

    def _count_scheduler(self) -> None:
        cache = self.scheduler.cache
        now = (self.scheduler.num_preemptions, cache.prefix_queries, cache.prefix_hits)
        if now != self._counted:
            preemptions, queries, hits = (new - old for new, old in zip(now, self._counted, strict=True))
            self._metrics.preemptions.inc(preemptions)
            self._metrics.prefix_cache_queries.inc(queries)
            self._metrics.prefix_cache_hits.inc(hits)
            self._counted = now
