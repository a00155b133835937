"""One request as the engine sees it: tokens, progress, status.

Knows nothing of text (tokens only), of transports, or of where its KV blocks lie.
"""

from __future__ import annotations

import enum
import time

from servd.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    """Where a request stands. A preempted one is WAITING again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a request ended; the value is what clients and metrics see."""

    STOP = "stop"  # end-of-text token, stop token or stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the client went away or asked for it
    DEADLINE = "deadline"  # the client's deadline passed
    ERROR = "error"  # it could not be computed


class Request:
    """A validated request: `num_computed_tokens` chases `num_tokens`, step by step.

    Async scheduling plans a step before the previous one's tokens are known. `num_inflight_tokens` counts tokens
    that are being sampled right now: planned positions go beyond the known tokens by that many.

    Drafts that the worker may guess in steps in flight are counted apart, in `num_inflight_drafts`: all other counts
    are those of a request whose drafts are all wrong, and are corrected when a step's tokens arrive.
    """

    __slots__ = (
        "arrival_time", "cache_salt", "eos_token_ids", "finish_reason", "first_scheduled_time", "keeps_blocks",
        "max_total_tokens", "num_cached_tokens", "num_computed_tokens", "num_inflight_drafts", "num_inflight_steps",
        "num_inflight_tokens", "num_output_tokens_at_death", "num_preemptions", "num_worker_deaths",
        "output_token_ids", "parent_id", "pin_id", "priority", "prompt_token_ids", "request_id", "sampling_params",
        "seed", "status",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        *,
        seed: int = 0,
        eos_token_ids: frozenset[int] = frozenset(),
        max_model_len: int,
        priority: int = 0,
        parent_id: str | None = None,
        cache_salt: str = "",
        pin_id: str | None = None,
        keeps_blocks: bool = False,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.sampling_params = sampling_params
        self.seed = seed
        self.eos_token_ids = eos_token_ids
        self.arrival_time = time.monotonic()
        self.priority = priority  # lower runs first
        self.parent_id = parent_id  # fork from this request's blocks once its prompt is computed
        self.cache_salt = cache_salt
        self.pin_id = pin_id  # its blocks are pinned under this name when all of its prompt is computed
        self.keeps_blocks = keeps_blocks  # once it is complete, for others to go on from (see Scheduler.fork)
        max_tokens = sampling_params.max_tokens
        room = max_model_len - len(prompt_token_ids)
        self.max_total_tokens = len(prompt_token_ids) + (room if max_tokens is None else min(max_tokens, room))

        self.status = RequestStatus.WAITING
        self.output_token_ids: list[int] = []
        self.num_computed_tokens = 0  # tokens whose KV is written, or will be by the steps in flight
        self.num_cached_tokens = 0  # of these, how many the prefix cache gave at the first admission
        self.num_inflight_tokens = 0
        self.num_inflight_drafts = 0
        self.num_inflight_steps = 0
        self.num_preemptions = 0
        self.num_worker_deaths = 0  # in steps of this request, since it last got past one
        self.num_output_tokens_at_death = 0  # at the last of them
        self.first_scheduled_time: float | None = None
        self.finish_reason: FinishReason | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_planned_tokens(self) -> int:
        """Known tokens and those being sampled in steps in flight."""
        return self.num_tokens + self.num_inflight_tokens

    def all_token_ids(self) -> list[int]:
        """A new list of all known tokens."""
        return self.prompt_token_ids + self.output_token_ids

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}, {self.status.value}, computed {self.num_computed_tokens} of "
            f"{self.num_prompt_tokens}+{len(self.output_token_ids)}+{self.num_inflight_tokens})"
        )
