"""A worker stand-in for scheduler tests: applies plans like a worker and answers deterministic tokens."""

from __future__ import annotations

import random

import pytest

from servd.cache.kv_cache_manager import KVCacheManager
from servd.config import SchedulerConfig
from servd.outputs import ModelRunnerOutput, SchedulerOutput
from servd.request import Request
from servd.sampling_params import SamplingParams
from servd.scheduler.scheduler import Scheduler


def next_token(tokens: list[int]) -> int:
    """The "model": depends on every token so far, so that a wrong history shows."""
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 31 + len(tokens)) % 97


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class WorkerModel:
    """Keeps a table and a KV memory per request from plans alone, as a worker does, and checks what it is told.

    It guesses as many tokens as plans allow; how many of them are right changes from step to step. Of constrained
    requests, a `share_deferred` gets no token in a step, as if their grammars were not ready.
    """

    def __init__(self, block_size: int, share_deferred: float = 0.0) -> None:
        self.block_size = block_size
        self.share_deferred = share_deferred
        self.num_deferred = 0
        self.constrained: set[str] = set()
        self._random = random.Random(1)
        self.tokens: dict[str, list[int]] = {}
        self.tables: dict[str, list[int]] = {}
        self.max_total_tokens: dict[str, int] = {}
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.num_accepted = 0

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        for request_id in plan.dropped_request_ids:
            del self.tokens[request_id], self.tables[request_id]
        for new in plan.new_requests:
            assert new.request_id not in self.tokens, f"{new.request_id} is new twice"
            self.tokens[new.request_id] = list(new.token_ids)
            self.tables[new.request_id] = list(new.block_ids)
            self.max_total_tokens[new.request_id] = new.max_total_tokens
            if new.sampling_params.is_constrained:
                self.constrained.add(new.request_id)
        for source, destination in plan.block_copies:
            for offset in range(self.block_size):
                if (source, offset) in self.memory:
                    self.memory[destination, offset] = self.memory[source, offset]
        for request_id, index, block in plan.replaced_blocks:
            self.tables[request_id][index] = block
        scheduled = plan.scheduled
        output = ModelRunnerOutput(plan.step_id, [], [], {}, {}, {}, 0.001)
        granted = scheduled.num_draft_tokens or [0] * len(scheduled.request_ids)
        columns = (scheduled.request_ids, scheduled.num_computed_tokens, scheduled.num_scheduled_tokens,
                   scheduled.new_block_ids, scheduled.samples, granted)  # fmt: skip
        for request_id, computed, count, new_blocks, samples, num_drafts in zip(*columns, strict=True):
            tokens = self.tokens[request_id]
            self.tables[request_id].extend(new_blocks)
            may_lag = samples and request_id in self.constrained
            known = computed + count <= len(tokens) or may_lag
            assert count > 0 and known, f"{request_id}: {computed}+{count} of {len(tokens)}"
            if not samples:
                assert num_drafts == 0, f"{request_id} may guess behind a chunk that does not reach its end"
                self._compute(request_id, tokens, computed, computed + count)
                continue
            room = self.max_total_tokens[request_id] - len(tokens) - 1
            if room < 0:
                continue  # guesses of the step before brought its last token
            drafts = self._guess(tokens, min(num_drafts, room))
            end = len(tokens)
            self._compute(request_id, tokens + drafts, end - count, end + len(drafts))
            if may_lag and self._random.random() < self.share_deferred:
                self.num_deferred += 1
                continue
            for draft in [*drafts, None]:
                tokens.append(next_token(tokens))
                if tokens[-1] != draft:
                    break
            output.request_ids.append(request_id)
            output.sampled_token_ids += tokens[end:]
            output.num_accepted_tokens.append(len(tokens) - end - 1)
        self.num_accepted += sum(output.num_accepted_tokens)
        if not scheduled.num_draft_tokens:
            output.num_accepted_tokens.clear()
        return output

    def _guess(self, tokens: list[int], count: int) -> list[int]:
        right = expected_tokens(tokens, count)
        num_right = sum(tokens) % (count + 1)
        return right[:num_right] + [(token + 1) % 97 for token in right[num_right:]]

    def _compute(self, request_id: str, tokens: list[int], begin: int, end: int) -> None:
        table = self.tables[request_id]
        for position in range(begin, end):
            slot = table[position // self.block_size], position % self.block_size
            self.memory[slot] = tuple(tokens[: position + 1])
        for position in range(end):
            slot = table[position // self.block_size], position % self.block_size
            assert self.memory.get(slot) == tuple(tokens[: position + 1]), f"{request_id} reads a stale slot"


@pytest.fixture
def make_scheduler():
    def make(num_blocks: int = 100, block_size: int = 4, **config) -> Scheduler:
        config.setdefault("max_num_batched_tokens", 32)
        config.setdefault("max_num_seqs", 8)
        config.setdefault("num_speculative_tokens", 0)
        return Scheduler(SchedulerConfig(**config), KVCacheManager(num_blocks, block_size))

    return make


@pytest.fixture
def make_request():
    def make(request_id: str, prompt: list[int] | int, max_tokens: int = 4, **kwargs) -> Request:
        tokens = [ord(request_id[0]) % 50 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        params = kwargs.pop("params", None) or SamplingParams(max_tokens=max_tokens)
        return Request(request_id, tokens, params, max_model_len=400, **kwargs)

    return make


def shares(plan: SchedulerOutput) -> dict[str, int]:
    return dict(zip(plan.scheduled.request_ids, plan.scheduled.num_scheduled_tokens, strict=True))
