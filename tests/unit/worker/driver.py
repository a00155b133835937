"""Drives a worker by hand, as the engine would: hands out blocks, plans steps, keeps the tokens.

Knows the plan's format alone; it is no scheduler.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from servd.outputs import ModelRunnerOutput, NewRequestData, ScheduledRequests, SchedulerOutput
from servd.sampling_params import SamplingParams


@dataclass
class Sequence:
    """A request as the driver sees it."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    is_known: bool = False
    outputs: list[ModelRunnerOutput] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class Driver:
    """Plans steps for `execute`, one at a time."""

    def __init__(self, execute: Callable[[SchedulerOutput], ModelRunnerOutput], block_size: int) -> None:
        self.execute = execute
        self.block_size = block_size
        self.sequences: dict[str, Sequence] = {}
        self.dropped: list[str] = []
        self._free_blocks = itertools.count(1)
        self._steps = itertools.count()

    def add(self, request_id: str, prompt: list[int], *, seed: int = 0, **params: Any) -> Sequence:
        params.setdefault("max_tokens", None)
        sequence = Sequence(request_id, prompt, SamplingParams(**params), seed)
        self.sequences[request_id] = sequence
        return sequence

    def preempt(self, request_id: str) -> None:
        """Drop it; it starts over in fresh blocks when it is next scheduled."""
        sequence = self.sequences[request_id]
        sequence.blocks, sequence.num_computed, sequence.is_known = [], 0, False
        self.dropped.append(request_id)

    def finish(self, request_id: str) -> None:
        del self.sequences[request_id]
        self.dropped.append(request_id)

    def new_block(self) -> int:
        return next(self._free_blocks)

    def plan(self, shares: dict[str, int], *, num_drafts: int = 0, **changes: Any) -> SchedulerOutput:
        """A step that computes so many tokens of each request (0: all that are left), and may guess `num_drafts`."""
        new, scheduled = [], ScheduledRequests([], [], [], [], [])
        for request_id, share in shares.items():
            sequence = self.sequences[request_id]
            left = len(sequence.tokens) - sequence.num_computed
            count = min(share, left) if share else left
            end = sequence.num_computed + count
            samples = end == len(sequence.tokens)
            num_blocks = -(-(end + num_drafts * samples) // self.block_size)
            blocks = [self.new_block() for _ in range(num_blocks - len(sequence.blocks))]
            sequence.blocks += blocks
            if not sequence.is_known:
                new.append(self._new_request(sequence))
                sequence.is_known, blocks = True, []
            scheduled.request_ids.append(request_id)
            scheduled.num_computed_tokens.append(sequence.num_computed)
            scheduled.num_scheduled_tokens.append(count)
            scheduled.new_block_ids.append(blocks)
            scheduled.samples.append(samples)
            if num_drafts:
                scheduled.num_draft_tokens.append(num_drafts * samples)
            sequence.num_computed = end
        dropped, self.dropped = self.dropped, []
        plan = SchedulerOutput(next(self._steps), new, scheduled, dropped, [], [])
        for name, value in changes.items():
            setattr(plan, name, value)
        return plan

    def step(self, shares: dict[str, int], **changes: Any) -> ModelRunnerOutput:
        """Plan, execute, take the tokens in."""
        output = self.execute(self.plan(shares, **changes))
        for request_id, token_ids in output.tokens_by_request().items():
            sequence = self.sequences[request_id]
            sequence.output += token_ids
            sequence.num_computed = len(sequence.tokens) - 1
        for request_id in shares:
            sequence = self.sequences[request_id]
            # Its grammar was not ready: the last token is computed again.
            sequence.num_computed = min(sequence.num_computed, len(sequence.tokens) - 1)
            sequence.outputs.append(output)
        return output

    def step_all(self) -> ModelRunnerOutput:
        """A step in which every request computes all that it has left."""
        return self.step(dict.fromkeys(self.sequences, 0))

    def _new_request(self, sequence: Sequence) -> NewRequestData:
        return NewRequestData(
            sequence.request_id, sequence.tokens, len(sequence.prompt), sequence.params, sequence.seed,
            [0], list(sequence.blocks), len(sequence.prompt) + (sequence.params.max_tokens or 10**6), [0],
        )  # fmt: skip
