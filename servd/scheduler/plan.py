"""A step: the message to the workers, what the scheduler keeps of it until the result is there, and what came of it.

Decides nothing; knows nothing of budgets or of queues.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from servd.cache.kv_cache_manager import Allocation
from servd.outputs import NewRequestData, ScheduledRequests, SchedulerOutput, TokenLogprobs
from servd.request import FinishReason, Request

# Tokens after a death that count as "further". The replay's one prefill gives the first: a request that kills in
# decode steps alone would never be found by it.
TOKENS_PAST_A_DEATH = 2


@dataclass(slots=True)
class Share:
    """A request's part of a step in flight."""

    request: Request
    num_computed_before: int
    num_computed_after: int
    samples: bool
    num_drafts: int = 0  # that the worker may guess


@dataclass(slots=True)
class Update:
    """What one step did for one request."""

    request: Request
    new_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a new token, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None
    embedding: bytes | None = None  # little-endian float32, once a pooled prompt is computed
    first_position: int = 0  # of the tokens computed in this step
    num_computed: int = 0  # tokens of this step, guesses not counted
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None

    def append_tokens(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> None:
        """Add sampled tokens to the request, up to the one that ends it."""
        request, output_token_ids = self.request, self.request.output_token_ids
        for token_id in token_ids:
            output_token_ids.append(token_id)
            self.new_token_ids.append(token_id)
            if _ends_with(request, token_id):
                self.finish_reason = FinishReason.STOP
                self.stop_token_id = token_id
                break
            if request.num_tokens >= request.max_total_tokens:
                self.finish_reason = FinishReason.LENGTH
                break
        self.logprobs = logprobs[: len(self.new_token_ids)]
        if len(output_token_ids) >= request.num_output_tokens_at_death + TOKENS_PAST_A_DEATH:
            request.num_worker_deaths = 0  # it got past the point where the workers died


def _ends_with(request: Request, token_id: int) -> bool:
    params = request.sampling_params
    is_end = token_id in request.eos_token_ids and not params.ignore_eos
    return (is_end or token_id in params.stop_token_ids) and len(request.output_token_ids) >= params.min_tokens


class Plan:
    """A SchedulerOutput being put together."""

    def __init__(self, step_id: int, dropped: list[str]) -> None:
        scheduled = ScheduledRequests([], [], [], [], [])
        self.output = SchedulerOutput(step_id, [], scheduled, dropped, [], [])
        self.shares: list[Share] = []

    def add(self, request: Request, num_tokens: int, samples: bool, allocation: Allocation) -> None:
        """The next tokens of a request, whose first is `num_computed_tokens`."""
        output, scheduled = self.output, self.output.scheduled
        scheduled.request_ids.append(request.request_id)
        scheduled.num_computed_tokens.append(request.num_computed_tokens)
        scheduled.num_scheduled_tokens.append(num_tokens)
        scheduled.samples.append(samples)
        scheduled.new_block_ids.append(allocation.new_block_ids)
        output.block_copies.extend(allocation.copies)
        output.replaced_blocks.extend((request.request_id, i, block) for i, block in allocation.replaced)
        first = request.num_computed_tokens
        self.shares.append(Share(request, first, first + num_tokens, samples))

    def introduce(self, request: Request, block_ids: list[int]) -> None:
        """Tell the workers all about a request that they do not know, its whole block table included."""
        params = request.sampling_params
        stop_ids = list(params.stop_token_ids) + ([] if params.ignore_eos else sorted(request.eos_token_ids))
        self.output.new_requests.append(
            NewRequestData(
                request.request_id, request.all_token_ids(), request.num_prompt_tokens, params, request.seed,
                stop_ids, block_ids, request.max_total_tokens,
                sorted(request.eos_token_ids) if params.is_constrained else [],
            )
        )  # fmt: skip
