"""The scheduler: hands out a step's token budget, preempts when blocks run out, and takes in a step's results.

There is no prefill or decode here: each request's `num_computed_tokens` chases its planned tokens. Knows nothing of
executors or text. Steps are planned ahead of their predecessors' results, so a plan never holds sampled tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

from servd.cache.kv_cache_manager import Allocation, KVCacheManager
from servd.config import SchedulerConfig
from servd.outputs import ModelRunnerOutput, SchedulerOutput
from servd.request import FinishReason, Request, RequestStatus
from servd.scheduler.plan import Plan, Share, Update
from servd.scheduler.policies import POLICIES
from servd.scheduler.queue import RequestQueue

# A request in whose steps the workers died (or the step failed) this often, and which got no further in between, runs
# in steps of its own; once more, and it is failed.
DEATHS_BEFORE_QUARANTINE = 2
GIVEN_UP = "the model worker failed each time it computed this request"


def _is_quarantined(request: Request) -> bool:
    """Whether the request may run only in steps of its own, to find out whether it is what kills the workers."""
    return request.num_worker_deaths >= DEATHS_BEFORE_QUARANTINE


class Scheduler:
    """Owns all live requests. Not thread-safe: one task calls it."""

    def __init__(self, config: SchedulerConfig, cache: KVCacheManager) -> None:
        self.config = config
        self.cache = cache
        self.policy = POLICIES.get(config.scheduling_policy)
        self.requests: dict[str, Request] = {}
        self.waiting = RequestQueue(self.policy)
        self.running = RequestQueue(self.policy)
        self.num_preemptions = 0
        # What kept the first waiting request out of the last plan: blocks, seats (max_num_seqs), token_budget,
        # quarantine (a suspect runs alone), or nothing but that steps in flight must end first.
        self.waiting_for = "next_step"
        self.on_stopped: Callable[[Request, str], None] | None = None  # told of each preemption, and why
        self._dropped: list[str] = []  # request ids the workers must forget with the next plan
        self._unsent: set[str] = set()  # running requests that the workers have not heard of
        self._held: dict[str, Request] = {}  # complete requests whose blocks are kept for forks
        self._inflight: dict[int, list[Share]] = {}
        self._step_ids = count()

    def add(self, request: Request) -> None:
        """Take in a new request, to run when its turn comes."""
        assert request.request_id not in self.requests, f"{request} is known already"
        self.requests[request.request_id] = request
        self.waiting.add(request)

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """End a request from outside (abort, stop string); its blocks are free at once. None if it is not known."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, reason)
        return request

    def fork(self, parent: Request, child: Request) -> None:
        """Add a request whose tokens are all that `parent`, which is complete, computed, and one more.

        It runs at once in the blocks of a parent with `keeps_blocks`. If these are gone (a preemption, lost workers, no
        other room for those that run), or no more requests may run, it waits and is computed anew.
        """
        child.num_worker_deaths = parent.num_worker_deaths
        child.num_output_tokens_at_death = parent.num_output_tokens_at_death - 1  # the child counts from the next token
        self.add(child)
        if parent.request_id in self._held and len(self.running) < self.config.max_num_seqs:
            child.num_computed_tokens = self.cache.fork(parent, child, parent.num_tokens - 1)
            self._start(child)
            self._unsent.add(child.request_id)

    def release(self, request: Request) -> None:
        """Free the blocks that a complete request kept."""
        if self._held.pop(request.request_id, None) is not None:
            self.cache.free(request)

    def has_work(self) -> bool:
        """Whether any request is alive."""
        return bool(self.requests)

    # -- planning -----------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step, or None if nothing can be computed before a step in flight ends."""
        plan = Plan(next(self._step_ids), self._dropped)
        budget = self.config.max_num_batched_tokens
        self._schedule_suspect(plan, budget)
        self.waiting_for = "quarantine" if plan.shares else "next_step"
        if not plan.shares:
            preemptions = self.num_preemptions
            budget = self._schedule_running(plan, budget, list(self.running))
            if self.num_preemptions == preemptions:  # else the blocks just freed would go straight back
                self._schedule_waiting(plan, budget)
            else:
                self.waiting_for = "blocks"
        if not plan.shares:
            if not self._inflight and self.requests and self._release_held():
                return self.schedule()  # nothing else could ever make room
            return None  # ids in `_dropped` go with the next plan that has work
        if self.config.num_speculative_tokens:
            self._grant_drafts(plan)
        self._dropped = []
        for share in plan.shares:
            request = share.request
            request.num_computed_tokens = share.num_computed_after
            request.num_inflight_steps += 1
            request.num_inflight_tokens += share.samples
            request.num_inflight_drafts += share.num_drafts
        self._inflight[plan.output.step_id] = plan.shares
        return plan.output

    def _schedule_suspect(self, plan: Plan, budget: int) -> None:
        """Give the step to one quarantined request alone: one that runs, or the next in the queue if there is room.

        The others keep their blocks meanwhile: a few steps show whether it is to blame.
        """
        suspect = next(filter(_is_quarantined, self.running), None)
        if suspect is not None:
            self._schedule_running(plan, budget, [suspect])
        elif len(self.running) < self.config.max_num_seqs:
            head = next(filter(self._may_start, self.waiting), None)
            if head is not None and _is_quarantined(head):
                self._admit(head, budget, plan)

    def _schedule_running(self, plan: Plan, budget: int, requests: list[Request]) -> int:
        behind = len(requests)
        for request in requests:
            behind -= 1
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted on behalf of one before it
            # Leave a token for each request behind, so that a long prompt never stalls the streams after it.
            num_tokens = self._num_tokens_to_compute(request, budget - behind)
            if num_tokens == 0:
                continue
            allocation = self._allocate_or_preempt(request, num_tokens, plan)
            if allocation is None:
                continue  # it was preempted itself, or waits for the next step
            if request.request_id in self._unsent:
                self._unsent.remove(request.request_id)
                plan.introduce(request, self.cache.block_ids(request))
                allocation = Allocation(copies=allocation.copies)
            plan.add(request, num_tokens, self._samples(request, num_tokens), allocation)
            budget -= num_tokens
        return budget

    def _schedule_waiting(self, plan: Plan, budget: int) -> None:
        for request in self.waiting:
            if budget == 0 or len(self.running) >= self.config.max_num_seqs:
                self.waiting_for = "token_budget" if budget == 0 else "seats"
                return
            if not self._may_start(request):
                continue
            if _is_quarantined(request):
                self.waiting_for = "quarantine"
                return  # its turn comes in a step of its own
            num_tokens = self._admit(request, budget, plan)
            if num_tokens is None:
                self.waiting_for = "blocks"
                return  # no room for it, and none may overtake it
            budget -= num_tokens

    def _admit(self, request: Request, budget: int, plan: Plan) -> int | None:
        """Start a waiting request if all its tokens fit, now and for a while; returns the tokens scheduled."""
        if self.cache.pool.num_free <= len(self.running):
            return None  # it needs one block at least: spare it the look-up of its prefix, step after step
        parent = self.requests.get(request.parent_id) if request.parent_id else None
        if parent is not None and parent.status is RequestStatus.RUNNING and not request.output_token_ids:
            request.num_computed_tokens = self.cache.fork(parent, request, request.num_prompt_tokens)
        else:
            request.num_computed_tokens = self.cache.attach_cached_prefix(request)
        num_cached = request.num_computed_tokens
        # Room for the whole prompt, and for one more block of every running request: without it, a request admitted
        # into the last blocks would be preempted a few steps later, over and over.
        table_length = len(self.cache.block_ids(request))
        needed = self.cache.num_blocks_for(request.num_tokens) - table_length + len(self.running)
        num_tokens = self._num_tokens_to_compute(request, budget)
        allocation = None
        if needed <= self.cache.pool.num_free:
            allocation = self._allocate(request, num_tokens)
        if allocation is None:
            self.cache.free(request)
            request.num_computed_tokens = 0
            return None
        self.cache.count_prefix_lookup(request.num_tokens, num_cached)
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_cached
        self._start(request)
        plan.introduce(request, self.cache.block_ids(request))
        # The table was sent whole: only the copies of shared blocks are left to tell.
        plan.add(request, num_tokens, self._samples(request, num_tokens), Allocation(copies=allocation.copies))
        return num_tokens

    def _start(self, request: Request) -> None:
        self.waiting.remove(request)
        self.running.add(request)
        request.status = RequestStatus.RUNNING
        if request.first_scheduled_time is None:
            request.first_scheduled_time = time.monotonic()

    def _grant_drafts(self, plan: Plan) -> None:
        """Let the worker guess ahead with what is left over: tokens of the budget, and blocks nobody needs soon.

        Not in a step with a piece of a prompt: its end must not wait for guesses. (A replay that began with several
        tokens would pass for a request that got past what killed the workers.)
        """
        if any(share.num_computed_after - share.num_computed_before > 1 for share in plan.shares):
            return
        budget = self.config.max_num_batched_tokens - plan.output.num_tokens
        for share, new_block_ids in zip(plan.shares, plan.output.scheduled.new_block_ids, strict=True):
            request = share.request
            room = request.max_total_tokens - request.num_planned_tokens - 1
            num_drafts = min(self.config.num_speculative_tokens, budget, room)
            if share.samples and num_drafts > 0:
                allocation = self._allocate(request, 1, num_drafts, num_kept_free=len(self.running))
                if allocation is not None:
                    new_block_ids += allocation.new_block_ids
                    share.num_drafts = num_drafts
                    budget -= num_drafts
        if any(share.num_drafts for share in plan.shares):
            plan.output.scheduled.num_draft_tokens = [share.num_drafts for share in plan.shares]

    def _allocate(
        self, request: Request, num_tokens: int, num_drafts: int = 0, *, num_kept_free: int = 0
    ) -> Allocation | None:
        """Slots for so many tokens and drafts, wherever the drafts in flight may have taken the request by then."""
        end = request.num_computed_tokens + num_tokens
        # The last token of all is sampled, not computed.
        farthest = min(end + request.num_inflight_drafts + num_drafts, request.max_total_tokens - 1)
        first = request.num_computed_tokens
        return self.cache.allocate_slots(request, first, max(end, farthest) - first, num_kept_free=num_kept_free)

    def _num_tokens_to_compute(self, request: Request, budget: int) -> int:
        todo = request.num_planned_tokens - request.num_computed_tokens
        if request.num_computed_tokens >= request.num_prompt_tokens and (
            request.num_planned_tokens >= request.max_total_tokens
        ):
            return 0  # its last token is being sampled, and needs no KV
        threshold = self.config.long_prefill_token_threshold
        return min(todo, budget, threshold) if threshold else min(todo, budget)

    def _samples(self, request: Request, num_tokens: int) -> bool:
        reaches_end = request.num_computed_tokens + num_tokens == request.num_planned_tokens
        return reaches_end and request.num_planned_tokens < request.max_total_tokens

    def _may_start(self, request: Request) -> bool:
        """Not while steps of it are in flight, nor before the parent has computed the prompt whose blocks it shares."""
        if request.num_inflight_steps:
            return False
        if request.parent_id is None or request.output_token_ids:
            return True
        parent = self.requests.get(request.parent_id)
        return parent is None or parent.num_computed_tokens >= parent.num_prompt_tokens

    # -- preemption and the end of requests ------------------------------------------------------------------------

    def _allocate_or_preempt(self, request: Request, num_tokens: int, plan: Plan) -> Allocation | None:
        """Slots for a running request, taken from the last running ones if need be; None if it is the last itself.

        None, too, in a step that copies blocks: one of these, set free, could be the target of another of its copies.
        """
        while True:
            allocation = self._allocate(request, num_tokens)
            if allocation is not None or plan.output.block_copies:
                return allocation
            victim = self.running.last()
            if victim is request and self._release_held():
                continue
            self.preempt(victim)
            if victim is request:
                return None

    def preempt(self, request: Request, reason: str = "blocks") -> None:
        """Take a running request's blocks; it waits at its place in the queue and is computed again from its tokens.

        Tokens of steps in flight still count when they arrive: the request waits for them before it starts again.
        `reason`: blocks, worker_died or step_failed.
        """
        assert request.status is RequestStatus.RUNNING, f"cannot preempt {request}"
        self.running.remove(request)
        self.cache.free(request)
        self._drop(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(request)
        if self.on_stopped is not None:
            self.on_stopped(request, reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._drop(request)
        else:
            self.waiting.remove(request)
        if request.keeps_blocks and reason is FinishReason.LENGTH and self.cache.holds_blocks(request):
            self._held[request.request_id] = request
        else:
            self.cache.free(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self.requests[request.request_id]

    def _drop(self, request: Request) -> None:
        """Have the workers forget a request, if they know it."""
        if request.request_id in self._unsent:
            self._unsent.remove(request.request_id)
        else:
            self._dropped.append(request.request_id)

    def _release_held(self) -> bool:
        """Free all blocks that are kept for forks; False if there are none."""
        held = list(self._held.values())
        for request in held:
            self.release(request)
        return bool(held)

    # -- results ---------------------------------------------------------------------------------------------------

    def update_from_output(self, output: ModelRunnerOutput) -> list[Update]:
        """Take in a finished step: append tokens, cache full blocks, end what is complete."""
        sampled = output.tokens_by_request()
        updates = []
        for share in self._inflight.pop(output.step_id):
            request = share.request
            request.num_inflight_steps -= 1
            request.num_inflight_tokens -= share.samples
            request.num_inflight_drafts -= share.num_drafts
            if request.status is RequestStatus.FINISHED:
                continue  # ended from outside while the step ran
            update = Update(request)
            request_id = request.request_id
            if request_id in output.failed:
                self.cache.forget_computed(request)
                update.error = output.failed[request_id]
                update.finish_reason = FinishReason.ERROR
            else:
                update.prompt_logprobs = output.prompt_logprobs.get(request_id)
                update.embedding = output.embeddings.get(request_id)
                update.first_position = share.num_computed_before
                update.num_computed = share.num_computed_after - share.num_computed_before
                num_computed = share.num_computed_after
                if share.samples:
                    token_ids = sampled.get(request_id, [])
                    assert token_ids or request.sampling_params.is_constrained, f"{request} got no token"
                    update.append_tokens(token_ids, output.logprobs.get(request_id, []))
                    num_computed = request.num_tokens - 1  # right drafts were computed, wrong ones count for nothing
                elif share.num_computed_after >= request.max_total_tokens:
                    update.finish_reason = FinishReason.LENGTH  # max_tokens is 0: only the prompt was wanted
                if request.status is RequestStatus.RUNNING:
                    if share.samples:  # one token was foreseen; with none, the last is computed again for its logits
                        request.num_computed_tokens += len(update.new_token_ids) - 1
                    self.cache.cache_full_blocks(request, num_computed)
                    if request.pin_id is not None and update.finish_reason is FinishReason.LENGTH:
                        self.cache.pin(request.pin_id, request)
            if update.finish_reason is not None:
                self._finish(request, update.finish_reason)
            updates.append(update)
        return updates

    def recover(self, *, workers_lost: bool) -> list[Update]:
        """The steps in flight are lost: every running request starts again from the tokens it has.

        The requests of the oldest step in flight, the one that was being computed, are the suspects. One that is a
        suspect again and again without getting further is first run alone, and then given up: those are returned.
        With `workers_lost` there is nobody to tell which requests to forget.
        """
        suspects = [share.request for share in self._inflight[min(self._inflight)]] if self._inflight else []
        for shares in self._inflight.values():
            for share in shares:
                request = share.request
                request.num_inflight_steps = request.num_inflight_tokens = request.num_inflight_drafts = 0
        self._inflight.clear()
        given_up = []
        for request in suspects:
            if request.status is RequestStatus.FINISHED:
                continue
            request.num_worker_deaths += 1
            request.num_output_tokens_at_death = len(request.output_token_ids)
            if request.num_worker_deaths > DEATHS_BEFORE_QUARANTINE:
                given_up.append(Update(request, finish_reason=FinishReason.ERROR, error=GIVEN_UP))
                self._finish(request, FinishReason.ERROR)
        for request in self.running:
            self.preempt(request, "worker_died" if workers_lost else "step_failed")
        self._release_held()
        self.cache.forget_cached()
        if workers_lost:
            self._dropped = []
        return given_up
