"""Values that cross a layer or a process: plans to the workers, results back, text to the caller.

Plain data with flat arrays (msgspec structs, cheap to encode); nothing here decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from servd.errors import ServdError
from servd.request import FinishReason
from servd.sampling_params import SamplingParams


class NewRequestData(msgspec.Struct, array_like=True):
    """All that a worker must know of a request, sent when it starts or starts again after a preemption."""

    request_id: str
    token_ids: list[int]  # [num_tokens] prompt and, after a preemption, the output so far
    num_prompt_tokens: int
    sampling_params: SamplingParams
    seed: int
    stop_token_ids: list[int]  # end-of-text and stop ids, masked out until min_tokens
    block_ids: list[int]  # [num_blocks]
    max_total_tokens: int  # prompt and output: the last of them is never computed
    eos_token_ids: list[int] = []  # the model's; sent with requests that are constrained


class ScheduledRequests(msgspec.Struct, array_like=True):
    """The requests of a step as parallel arrays, in batch order; known requests are described by diffs alone."""

    request_ids: list[str]  # [num_reqs]
    num_computed_tokens: list[int]  # [num_reqs] position of the first token computed in this step
    num_scheduled_tokens: list[int]  # [num_reqs]
    new_block_ids: list[list[int]]  # [num_reqs][new blocks], appended to the worker's table
    samples: list[bool]  # [num_reqs] whether the last scheduled token gets logits and a sampled token
    # [num_reqs] how many tokens behind the last one the worker may guess, compute and check in the same step; empty:
    # none in this step. While guesses are in flight only the worker knows how far a request is: what it samples
    # follows the last of its known tokens, and `num_computed_tokens` is the least that it has computed.
    num_draft_tokens: list[int] = []


class SchedulerOutput(msgspec.Struct, array_like=True):
    """The plan of one step."""

    step_id: int
    new_requests: list[NewRequestData]
    scheduled: ScheduledRequests
    dropped_request_ids: list[str]  # finished, aborted or preempted: the worker forgets them before the step
    block_copies: list[tuple[int, int]]  # (source, destination) copied before the step: copy-on-write
    replaced_blocks: list[tuple[str, int, int]]  # (request, index in its table, new block): copy-on-write

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, at most."""
        return sum(self.scheduled.num_scheduled_tokens) + sum(self.scheduled.num_draft_tokens)


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position: of the token itself and of the best alternatives."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top_token_ids: list[int]  # best first
    top_logprobs: list[float]


class KVShadowSample(msgspec.Struct, array_like=True):
    """One request's next-token distribution, compared with what an unquantized KV cache would have given."""

    kl_divergence: float  # nats
    is_top1_equal: bool  # the likeliest token is the same
    num_tokens: int  # before the one compared


class ModelRunnerOutput(msgspec.Struct, array_like=True):
    """What a step gave."""

    step_id: int
    # [num_sampled] the requests with samples=True, in batch order, without those whose grammar was not ready in time:
    # they are computed again in a later step
    request_ids: list[str]
    sampled_token_ids: list[int]  # [num_sampled + accepted drafts] in the order of the requests
    logprobs: dict[str, list[TokenLogprobs]]  # one a token, only requests that asked for them
    prompt_logprobs: dict[str, list[TokenLogprobs]]  # for prompt positions computed in this step, in order
    failed: dict[str, str]  # request id → why it alone could not be computed
    compute_seconds: float  # wall time in the worker
    kv_shadow: KVShadowSample | None = None  # in the share of steps that --kv-shadow-rate asks for
    num_draft_tokens: int = 0  # guessed and computed in this step
    # [num_sampled] drafts of each request that were right: it has so many tokens more than one; empty: none
    num_accepted_tokens: list[int] = []
    embeddings: dict[str, bytes] = {}  # pooled prompts that ended in this step: little-endian float32 [hidden_size]

    def tokens_by_request(self) -> dict[str, list[int]]:
        """The tokens of each request that has any."""
        if not self.num_accepted_tokens:
            return {r: [token_id] for r, token_id in zip(self.request_ids, self.sampled_token_ids, strict=True)}
        found, begin = {}, 0
        for request_id, num_accepted in zip(self.request_ids, self.num_accepted_tokens, strict=True):
            end = begin + 1 + num_accepted
            found[request_id] = self.sampled_token_ids[begin:end]
            begin = end
        return found


class WorkerInfo(msgspec.Struct, array_like=True):
    """What the worker reports once it has loaded the model and measured its memory."""

    device: str
    dtype: str
    num_blocks: int  # KV blocks, the null block included
    block_bytes: int  # of one block over all layers
    kernel_backend: str
    hidden_size: int = 0  # length of an embedding


@dataclass(slots=True)
class RequestOutput:
    """News of one request since the caller last looked; consecutive ones are merged when the caller is slow."""

    request_id: str
    index: int  # which of the n answers
    text: str = ""  # new text
    token_ids: list[int] = field(default_factory=list)  # new tokens
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a new token, if asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # whole prompt, first None; set once
    embedding: bytes | None = None  # little-endian float32 [hidden_size], with the finish reason
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0  # so far, these included
    error: ServdError | None = None  # set with finish_reason ABORT, DEADLINE and ERROR: half an answer is no answer

    def merge(self, later: RequestOutput) -> None:
        """Take in `later`, which follows this one."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt_logprobs = later.prompt_logprobs if self.prompt_logprobs is None else self.prompt_logprobs
        self.embedding = later.embedding
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.num_cached_tokens = later.num_cached_tokens
        self.num_output_tokens = later.num_output_tokens
        self.error = later.error
