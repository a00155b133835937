"""What happened to one answer, step by step: phases, waits, chunks, batch sizes, and stalls with their causes.

Bounded in size however long the answer runs. Knows nothing of tenants or ids; RequestLog feeds it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from servd.request import FinishReason, Request
from servd.scheduler.plan import Update

STALL_SECONDS = 0.05  # between two tokens, or in the queue; and STALL_TIMES the answer's own median gap
STALL_TIMES = 4.0
NUM_GAPS = 32  # latest ones, that the median is of
WAITING_PHASES = ("queued", "preempted", "recovering")
MAX_ENTRIES = 64  # of each list; beyond it things are only counted

# What a waiting request waits for, besides the Scheduler's own `waiting_for`.
RESTART = "worker_restart"
FIRST_ANSWER = "first_answer"  # the prompt that it shares is being computed


@dataclass(frozen=True, slots=True)
class StepFact:
    """One step, as it was taken in."""

    step_id: int
    end: float  # time.monotonic() seconds
    seconds: float  # from its submission, or the end of the step before, to `end`
    compute_seconds: float  # of these, in the worker
    num_reqs: int
    num_prefill_tokens: int
    is_quarantine: bool  # it held one suspect alone


class AnswerRecord:
    """The story of one answer. Times are time.monotonic() seconds inside, seconds since arrival outside."""

    __slots__ = (
        "_gaps", "_last_step_id", "_num_gaps", "_phase", "_phase_since", "_unread_since", "_waits_before", "arrival",
        "batch_max", "batch_min", "batch_sum", "chunks", "created", "finish_reason", "finished_at", "first_token",
        "gap_waits", "index", "interrupted_by", "last_token", "longest_gap", "num_cached_tokens", "num_chunks",
        "num_decode_steps", "num_output_tokens", "num_preemptions", "num_prompt_tokens", "num_stalls", "num_steps",
        "num_worker_deaths", "preemptions", "seconds", "stalls", "unread_seconds", "waits", "waits_for_first",
    )  # fmt: skip

    def __init__(
        self, request: Request, index: int, waits: dict[str, float], unread_since: Callable[[int], float | None]
    ) -> None:
        """`waits`: seconds that the queue's head has waited so far, by cause."""
        self._unread_since = unread_since
        self.index = index
        self.arrival = self._phase_since = request.arrival_time
        self.created = time.time() - (time.monotonic() - request.arrival_time)
        self.num_prompt_tokens = request.num_prompt_tokens
        self.waits_for_first = request.parent_id is not None
        self.num_cached_tokens = self.num_output_tokens = self.num_steps = self.num_decode_steps = 0
        self.num_chunks = self.num_preemptions = self.num_stalls = self.num_worker_deaths = 0
        self.batch_min = self.batch_max = self.batch_sum = 0
        self.chunks: list[tuple[float, StepFact, int]] = []  # (end, step, tokens)
        self.preemptions: list[tuple[float, str]] = []
        self.stalls: list[dict[str, Any]] = []
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.longest_gap = self.unread_seconds = 0.0
        self.interrupted_by: str | None = None  # since the last token: preempted, worker_restarted or step_failed
        self.finish_reason: FinishReason | None = None
        self.finished_at: float | None = None
        self.seconds: dict[str, float] = {}  # by phase
        self.waits: dict[str, float] = {}  # by cause
        self.gap_waits: dict[str, float] = {}  # the part since the last token
        self._phase = "queued"
        self._waits_before: dict[str, float] | None = waits
        self._last_step_id = -1  # of a search
        self._gaps = array("d")
        self._num_gaps = 0

    # -- what happens ----------------------------------------------------------------------------------------------

    def started(self, now: float, waits: Mapping[str, float]) -> None:
        """It is in a step: for the first time, or again."""
        self._leave_queue(now, waits)
        self._enter("prefill" if self._phase == "queued" else "recompute", now)

    def _leave_queue(self, now: float, waits: Mapping[str, float]) -> None:
        found = self._waited(now, waits)
        for cause, seconds in found.items():
            self.waits[cause] = self.waits.get(cause, 0.0) + seconds
            self.gap_waits[cause] = self.gap_waits.get(cause, 0.0) + seconds
        queued = now - self._phase_since
        if self._phase == "queued" and queued > STALL_SECONDS:
            self._stall(self._phase_since, queued, max(found, key=lambda cause: found[cause], default="next_step"), {})
        self._waits_before = None

    def stopped(self, reason: str, now: float, waits: dict[str, float]) -> None:
        """Its blocks were taken: `reason` is "blocks", "worker_died" or "step_failed"."""
        self._waits_before = waits
        if reason == "blocks":
            self.interrupted_by = self.interrupted_by or "preempted"
            self._count_preemption(now)
            self._enter("preempted", now)
            return
        self.interrupted_by = "worker_restarted" if reason == "worker_died" else "step_failed"
        self.num_worker_deaths += reason == "worker_died"
        self._enter("recovering", now)

    def step(self, update: Update, step: StepFact, history: Iterable[StepFact]) -> None:
        """A step of it ended; `history`: the last steps, newest first."""
        self._count_step(step.num_reqs)
        count = len(update.new_token_ids)
        if update.num_computed > 1 or not count:
            self.num_chunks += 1
            self.num_cached_tokens = update.request.num_cached_tokens
            if len(self.chunks) < MAX_ENTRIES:
                self.chunks.append((step.end, step, update.num_computed))
        if not count:
            return
        self.num_output_tokens += count
        self.num_decode_steps += 1
        if self.last_token is None:
            self.first_token = step.end
        else:
            self._gap(self.last_token, step, history)
        self.last_token = step.end
        if self._phase not in WAITING_PHASES:  # else the token is of a step that was in flight when it was stopped
            self.interrupted_by = None
            if self.gap_waits:
                self.gap_waits = {}
            if self._phase != "decode":
                self._enter("decode", step.end)

    def _count_step(self, size: int) -> None:
        self.num_steps += 1
        self.batch_sum += size
        if size > self.batch_max:
            self.batch_max = size
        if size < self.batch_min or self.num_steps == 1:
            self.batch_min = size

    def search_started(self, now: float, waits: Mapping[str, float]) -> None:
        """A request of the beam search that this answer comes from is in a step."""
        if self._phase == "queued":
            self.waits_for_first = False
            self._leave_queue(now, waits)
            self._enter("search", now)

    def search_step(self, step: StepFact) -> None:
        """A step ended that held one of the search's beams; it is counted once."""
        if step.step_id != self._last_step_id:
            self._last_step_id = step.step_id
            self._count_step(step.num_reqs)

    def beam_stopped(self, reason: str, now: float) -> None:
        """A beam lost its blocks."""
        if reason == "blocks":
            self._count_preemption(now)

    def _count_preemption(self, now: float) -> None:
        self.num_preemptions += 1
        if len(self.preemptions) < MAX_ENTRIES:
            self.preemptions.append((now, "blocks"))

    def unread(self, since: float, seconds: float) -> None:
        """What was ready at `since` was fetched only after so long."""
        self.unread_seconds += seconds
        self._stall(since, seconds, "client_not_reading", {})

    def finished(self, reason: FinishReason, now: float) -> None:
        """It is over."""
        self.finish_reason, self.finished_at = reason, now
        self._enter("", now)

    # -- judging ---------------------------------------------------------------------------------------------------

    def _gap(self, before: float, step: StepFact, history: Iterable[StepFact]) -> None:
        gap = step.end - before
        if gap > self.longest_gap:
            self.longest_gap = gap
        if gap > STALL_SECONDS and gap > STALL_TIMES * self.median_gap:
            cause, detail = self._judge(before, gap, history)
            self._stall(before, gap, cause, detail)
        if len(self._gaps) < NUM_GAPS:
            self._gaps.append(gap)
        else:
            self._gaps[self._num_gaps % NUM_GAPS] = gap
        self._num_gaps += 1

    def _judge(self, before: float, gap: float, history: Iterable[StepFact]) -> tuple[str, dict[str, Any]]:
        """Why no token came for so long."""
        if self.interrupted_by is not None:
            return self.interrupted_by, {"waited_for": dict(self.gap_waits)}
        window = []
        for fact in history:
            if fact.end <= before:
                break
            window.append(fact)
        slowest = max(window, key=lambda fact: fact.seconds)
        detail = {
            "step": slowest.step_id,
            "step_seconds": slowest.seconds,
            "compute_seconds": slowest.compute_seconds,
            "prefill_tokens": slowest.num_prefill_tokens,
        }
        if any(fact.is_quarantine for fact in window):
            return "quarantine", detail
        if slowest.num_prefill_tokens:
            return "prefill_of_others", detail
        if sum(fact.compute_seconds for fact in window) >= gap / 2:
            return "slow_step", detail
        return "front_busy", detail

    @property
    def median_gap(self) -> float:
        """Of the latest gaps between tokens; 0 before there are any."""
        return sorted(self._gaps)[len(self._gaps) // 2] if self._gaps else 0.0

    def _stall(self, since: float, seconds: float, cause: str, detail: dict[str, Any]) -> None:
        self.num_stalls += 1
        if len(self.stalls) < MAX_ENTRIES:
            entry = {"at_seconds": since - self.arrival, "seconds": seconds, "cause": cause}
            self.stalls.append(entry | ({"detail": detail} if detail else {}))

    def _waited(self, now: float, waits: Mapping[str, float]) -> dict[str, float]:
        """Seconds of this wait by cause; they add up to its length."""
        if self.waits_for_first and self._phase == "queued":
            return {FIRST_ANSWER: now - self._phase_since}
        before = self._waits_before or {}
        found = {cause: total - before.get(cause, 0.0) for cause, total in waits.items()}
        return {cause: seconds for cause, seconds in found.items() if seconds > 0}

    def _enter(self, phase: str, now: float) -> None:
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._phase_since
        self._phase, self._phase_since = phase, now

    # -- showing ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """waiting, running or finished."""
        if self.finished_at is not None:
            return "finished"
        return "waiting" if self._phase in WAITING_PHASES else "running"

    def as_dict(self, now: float, waits: Mapping[str, float]) -> dict[str, Any]:
        """Plain values for a reply. The phases' seconds add up to `total_seconds`."""
        end = now if self.finished_at is None else self.finished_at
        phases, waited = dict(self.seconds), dict(self.waits)
        if self._phase:
            phases[self._phase] = phases.get(self._phase, 0.0) + end - self._phase_since
        if self.state == "waiting":
            for cause, seconds in self._waited(now, waits).items():
                waited[cause] = waited.get(cause, 0.0) + seconds
        unread_since = self._unread_since(self.index)
        first = None if self.first_token is None else self.first_token - self.arrival
        return {
            "index": self.index,
            "state": self.state,
            "finish_reason": None if self.finish_reason is None else self.finish_reason.value,
            "created": self.created,
            "total_seconds": end - self.arrival,
            "seconds": phases,
            "waited_for": waited,
            "time_to_first_token_seconds": first,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": None if "search" in phases else self.num_output_tokens,  # a search has them at its end
            "num_steps": self.num_steps,
            "batch_size": None if not self.num_steps else {
                "min": self.batch_min, "mean": self.batch_sum / self.num_steps, "max": self.batch_max
            },
            "num_prefill_chunks": self.num_chunks,
            "prefill_chunks": [
                {"step": step.step_id, "tokens": tokens, "at_seconds": at - self.arrival, "seconds": step.seconds,
                 "batch_size": step.num_reqs}
                for at, step, tokens in self.chunks
            ],
            "num_preemptions": self.num_preemptions,
            "preemptions": [{"at_seconds": at - self.arrival, "reason": reason} for at, reason in self.preemptions],
            "num_worker_deaths": self.num_worker_deaths,
            "accepted_draft_tokens": self.num_output_tokens - self.num_decode_steps,
            "gap_seconds": {"median": self.median_gap, "max": self.longest_gap},
            "unread_seconds": self.unread_seconds + (0.0 if unread_since is None else now - unread_since),
            "num_stalls": self.num_stalls,
            "stalls": list(self.stalls),
        }  # fmt: skip
