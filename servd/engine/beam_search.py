"""Runs beam searches: each beam's next token is a request of its own, which goes on in the blocks of the one before.

Owns those requests and hands the engine the finished answers. Knows nothing of text, streams or how beams are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from servd.engine.beams import Beam, BeamState
from servd.outputs import TokenLogprobs
from servd.request import FinishReason, Request
from servd.sampling_params import SamplingParams
from servd.scheduler.plan import Update
from servd.scheduler.scheduler import Scheduler


@dataclass(slots=True)
class _Search:
    """One prompt's search: a request for each beam of the present step."""

    answers: list[Request]  # what the caller asked for; the scheduler never sees these
    state: BeamState
    requests: list[Request] = field(default_factory=list)  # one a beam, in its order
    found: dict[str, TokenLogprobs] = field(default_factory=dict)  # request id → its likeliest next tokens
    numbers: count[int] = field(default_factory=count)

    def new_request(self, token_ids: list[int], prompt_logprobs: int | None = None) -> Request:
        """A request for the token that follows these; nothing of it but the alternatives is used."""
        answer = self.answers[0]
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            logprobs=self.state.num_alternatives,
            prompt_logprobs=prompt_logprobs,
        )
        request = Request(
            f"{answer.request_id}.{next(self.numbers)}", token_ids, params,
            max_model_len=len(token_ids) + 1,
            priority=answer.priority,
            cache_salt=answer.cache_salt,
            keeps_blocks=True,
        )  # fmt: skip
        request.arrival_time = answer.arrival_time  # a search keeps its place among the others
        return request


def _new_state(answer: Request) -> BeamState:
    params = answer.sampling_params
    return BeamState(
        width=params.num_sequences,
        max_length=answer.max_total_tokens - answer.num_prompt_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        stop_token_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else answer.eos_token_ids),
        min_length=params.min_tokens,
        num_top=params.logprobs or 0,
    )


class BeamSearches:
    """All searches that run. Called on the engine's loop, between steps."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._by_request: dict[str, _Search] = {}
        self._by_answer: dict[str, _Search] = {}

    def start(self, answers: list[Request]) -> None:
        """Search for the best `len(answers)` answers to a prompt; they are the same but for their ids."""
        first = answers[0]
        search = _Search(answers, _new_state(first))
        for answer in answers:
            self._by_answer[answer.request_id] = search
        root = search.new_request(first.prompt_token_ids, first.sampling_params.prompt_logprobs)
        search.requests.append(root)
        self._by_request[root.request_id] = search
        self._scheduler.add(root)

    def process(self, updates: list[Update]) -> list[Update]:
        """A step's updates, those of searches replaced by what they mean for the answers."""
        if not self._by_request:
            return updates
        passed_on: list[Update] = []
        searches = [self._by_request.get(update.request.request_id) for update in updates]
        for update, search in zip(updates, searches, strict=True):
            if search is None:
                passed_on.append(update)
            elif update.request in search.requests:  # else the search was ended by an update before this one
                passed_on += self._take(search, update)
        return passed_on

    def end(self, answer_id: str) -> None:
        """Stop the search for this answer, and so for the others of its prompt. Unknown ones are ignored."""
        search = self._by_answer.get(answer_id)
        if search is not None:
            for request in search.requests:
                self._scheduler.finish(request.request_id, FinishReason.ABORT)
            self._forget(search)

    def _take(self, search: _Search, update: Update) -> list[Update]:
        request = update.request
        if update.finish_reason is FinishReason.ERROR:
            self.end(search.answers[0].request_id)
            return [
                Update(answer, finish_reason=FinishReason.ERROR, error=update.error) for answer in search.answers
            ]
        news: list[Update] = []
        if update.prompt_logprobs:
            news += [
                Update(answer, prompt_logprobs=update.prompt_logprobs, first_position=update.first_position)
                for answer in search.answers
            ]
        if update.finish_reason is not None:
            search.found[request.request_id] = update.logprobs[0]
        if len(search.found) == len(search.requests):
            self._begin_answers(search)
            beams = search.state.advance([search.found[parent.request_id] for parent in search.requests])
            if beams:
                self._go_on(search, beams)
            else:
                news += _finished(search)
                self._forget(search)
        return news

    def _begin_answers(self, search: _Search) -> None:
        for answer in search.answers:
            if answer.first_scheduled_time is None:
                answer.first_scheduled_time = search.requests[0].first_scheduled_time
                answer.num_cached_tokens = search.requests[0].num_cached_tokens

    def _go_on(self, search: _Search, beams: list[tuple[int, Beam]]) -> None:
        parents, search.requests = search.requests, []
        search.found.clear()
        for index, beam in beams:
            child = search.new_request([*parents[index].prompt_token_ids, beam.token_id])
            search.requests.append(child)
            self._by_request[child.request_id] = search
            self._scheduler.fork(parents[index], child)
        self._release(parents)

    def _forget(self, search: _Search) -> None:
        self._release(search.requests)
        search.requests = []
        for answer in search.answers:
            del self._by_answer[answer.request_id]

    def _release(self, requests: list[Request]) -> None:
        for request in requests:
            del self._by_request[request.request_id]
            self._scheduler.release(request)


def _finished(search: _Search) -> list[Update]:
    """The best hypotheses, as if a step had brought each of them whole."""
    updates = []
    for answer, hypothesis in zip(search.answers, search.state.complete, strict=False):
        entries = hypothesis.beam.entries()
        stopped = hypothesis.finish_reason is FinishReason.STOP
        updates.append(
            Update(
                answer,
                new_token_ids=[entry.token_id for entry in entries],
                logprobs=entries if answer.sampling_params.logprobs is not None else [],
                finish_reason=hypothesis.finish_reason,
                stop_token_id=hypothesis.beam.token_id if stopped else None,
            )
        )
    return updates
