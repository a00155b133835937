"""A bounded record of each request, running or among the last to finish: why was it slow, in its own words.

Owns ids and tenants, and the clock of what the queue waits for. Scheduler, core and streams report; costs a few
operations a request and step. Knows no texts and no tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from servd.engine.answer_record import RESTART, AnswerRecord, StepFact
from servd.errors import NotFoundError
from servd.outputs import ModelRunnerOutput, SchedulerOutput
from servd.request import FinishReason, Request
from servd.scheduler.plan import Update

MAX_FINISHED = 1000  # answers
MAX_STEPS = 256  # that a stall is judged by


class UnknownRequestError(NotFoundError):
    """No such request: never made, long over, or another tenant's."""

    code = "request_not_found"


@dataclass(slots=True)
class _Call:
    """The answers of one engine request."""

    request_id: str
    answers: list[AnswerRecord]
    tenant: str = ""
    names: tuple[str, ...] = ()  # under which clients know it
    unfinished: dict[str, AnswerRecord] = field(default_factory=dict)  # by answer id


class RequestLog:
    """All records of an engine; touched on its event loop alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: dict[str, _Call] = {}  # by request id, oldest first
        self._by_name: dict[tuple[str, str], dict[str, None]] = {}  # (tenant, name) → request ids
        self._live: dict[str, tuple[_Call, AnswerRecord]] = {}  # by answer id
        self._finished: deque[_Call] = deque()
        self._num_finished = 0  # answers in these
        self._steps: deque[StepFact] = deque(maxlen=MAX_STEPS)  # newest first
        self._submitted: dict[int, tuple[float, bool]] = {}  # step id → when, and whether it holds a suspect alone
        self._waits: dict[str, float] = {}
        self._waiting_for = "next_step"
        self._waiting_since = clock()

    # -- requests --------------------------------------------------------------------------------------------------

    def begin(
        self, request_id: str, requests: list[Request], unread_since: Callable[[int], float | None]
    ) -> list[AnswerRecord]:
        """A request's answers were queued; returns their records, by index.

        `unread_since`: since when the client has left news of an answer unread (None: it has not).
        """
        waits = self._waits_now()
        records = [AnswerRecord(request, index, dict(waits), unread_since) for index, request in enumerate(requests)]
        call = _Call(request_id, records)
        for request, record in zip(requests, records, strict=True):
            self._live[request.request_id] = (call, record)
            call.unfinished[request.request_id] = record
        self._forget(self._calls.get(request_id))  # an id that is used again
        self._calls[request_id] = call
        self.claim(request_id)
        return records

    def claim(self, request_id: str, *, tenant: str = "", alias: str = "") -> None:
        """Whose request it is, and what else it is called: `alias`, and ID for all of ID-0, ID-1, …"""
        call = self._calls[request_id]
        self._unname(call)
        group, _, number = request_id.rpartition("-")
        names = (request_id, *((group,) if group and number.isdecimal() else ()), *((alias,) if alias else ()))
        call.tenant, call.names = tenant, names
        for name in names:
            self._by_name.setdefault((tenant, name), {})[request_id] = None

    def tenant_of(self, answer_id: str) -> str | None:
        """Whose an answer is, 'REQUEST#INDEX', or a step of the search for it; None: it ended too long ago."""
        call = self._calls.get(answer_id.rpartition("#")[0])
        return None if call is None else call.tenant

    def finish(self, answer_id: str, reason: FinishReason) -> None:
        """An answer is over."""
        found = self._live.pop(answer_id, None)
        if found is None:
            return
        call, record = found
        record.finished(reason, self._clock())
        del call.unfinished[answer_id]
        if not call.unfinished:
            self._finished.append(call)
            self._num_finished += len(call.answers)
            while self._num_finished > MAX_FINISHED and len(self._finished) > 1:
                oldest = self._finished.popleft()
                self._num_finished -= len(oldest.answers)
                if self._calls.get(oldest.request_id) is oldest:
                    self._forget(oldest)

    def _forget(self, call: _Call | None) -> None:
        if call is not None:
            self._unname(call)
            del self._calls[call.request_id]

    def _unname(self, call: _Call) -> None:
        for name in call.names:
            ids = self._by_name[call.tenant, name]
            ids.pop(call.request_id, None)
            if not ids:
                del self._by_name[call.tenant, name]
        call.names = ()

    # -- what the engine reports -----------------------------------------------------------------------------------

    def planned(self, plan: SchedulerOutput, waiting_for: str) -> None:
        """A step was submitted; `waiting_for` is the scheduler's."""
        now = self._clock()
        self._submitted[plan.step_id] = (now, waiting_for == "quarantine")
        if plan.new_requests:
            waits = self._waits_now()
            for new in plan.new_requests:
                found = self._live.get(new.request_id)
                if found is not None:
                    found[1].started(now, waits)
                for record in self._searched_for(new.request_id):
                    record.search_started(now, waits)

    def waits_for(self, cause: str) -> None:
        """What keeps the head of the queue from starting, from now on."""
        if cause != self._waiting_for:
            self._waits = self._waits_now()
            self._waiting_for, self._waiting_since = cause, self._clock()

    def stopped(self, request: Request, reason: str) -> None:
        """A running request lost its blocks; it waits again."""
        if (found := self._live.get(request.request_id)) is not None:
            found[1].stopped(reason, self._clock(), self._waits_now())
        for record in self._searched_for(request.request_id):
            record.beam_stopped(reason, self._clock())

    def steps_lost(self, *, workers_lost: bool) -> None:
        """The steps in flight have no results."""
        self._submitted.clear()
        if workers_lost:
            self.waits_for(RESTART)

    def stepped(self, plan: SchedulerOutput, output: ModelRunnerOutput, updates: list[Update]) -> None:
        """A step was taken in."""
        now = self._clock()
        submitted, is_quarantine = self._submitted.pop(plan.step_id, (now, False))
        begin = max(submitted, self._steps[0].end) if self._steps else submitted
        counts = plan.scheduled.num_scheduled_tokens
        step = StepFact(
            plan.step_id, now, now - begin, output.compute_seconds, len(counts),
            sum(counts) - counts.count(1), is_quarantine,
        )  # fmt: skip
        self._steps.appendleft(step)
        for update in updates:
            found = self._live.get(update.request.request_id)
            if found is not None:
                found[1].step(update, step, self._steps)
                continue
            for record in self._searched_for(update.request.request_id):
                record.search_step(step)

    def _searched_for(self, request_id: str) -> list[AnswerRecord]:
        """The answers that a beam search's own request, named ANSWER.NUMBER, works for; none for other requests."""
        if request_id in self._live:
            return []
        found = self._live.get(request_id.rpartition(".")[0])
        return [] if found is None else found[0].answers

    def _waits_now(self) -> dict[str, float]:
        """Seconds since the start that the queue's head has waited, or would have, by cause."""
        waits = dict(self._waits)
        waits[self._waiting_for] = waits.get(self._waiting_for, 0.0) + self._clock() - self._waiting_since
        return waits

    # -- what callers ask ------------------------------------------------------------------------------------------

    def describe(self, name: str, tenant: str = "") -> dict[str, Any]:
        """The records of a request by any of its names. Raises UnknownRequestError, also for another tenant's."""
        ids = self._by_name.get((tenant, name))
        if not ids:
            raise UnknownRequestError(
                f"request {name[:100]!r} does not exist, or ended too long ago (the last {MAX_FINISHED} are kept)",
                param="id",
            )
        now, waits = self._clock(), self._waits_now()
        calls = [self._calls[request_id] for request_id in ids]
        shown = []
        for prompt, call in enumerate(calls):
            shown += [{"prompt": prompt, **record.as_dict(now, waits)} for record in call.answers]
        return {"id": name, "object": "request", "state": _state(calls), "answers": shown}

    def overview(self, tenant: str = "", *, state: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """Ids, states and ages of the tenant's requests, newest first."""
        now = self._clock()
        found: list[dict[str, Any]] = []
        for call in reversed(self._calls.values()):
            if len(found) == limit:
                break
            if call.tenant == tenant and state in (None, _state([call])):
                first = call.answers[0]
                found.append(
                    {"id": call.request_id, "object": "request", "state": _state([call]), "created": first.created,
                     "age_seconds": now - first.arrival}
                )  # fmt: skip
        return found


def _state(calls: list[_Call]) -> str:
    """running if any answer runs, else waiting if any waits, else finished."""
    states = {record.state for call in calls for record in call.answers}
    return next(state for state in ("running", "waiting", "finished") if state in states)
