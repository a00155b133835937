"""A worker stand-in for scheduler tests: applies plans like a worker and answers deterministic tokens."""

from __future__ import annotations

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
    """Keeps a table and a KV memory per request from plans alone, as a worker does, and checks what it is told."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tokens: dict[str, list[int]] = {}
        self.tables: dict[str, list[int]] = {}
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        for request_id in plan.dropped_request_ids:
            del self.tokens[request_id], self.tables[request_id]
        for new in plan.new_requests:
            assert new.request_id not in self.tokens, f"{new.request_id} is new twice"
            self.tokens[new.request_id] = list(new.token_ids)
            self.tables[new.request_id] = list(new.block_ids)
        for source, destination in plan.block_copies:
            for offset in range(self.block_size):
                if (source, offset) in self.memory:
                    self.memory[destination, offset] = self.memory[source, offset]
        for request_id, index, block in plan.replaced_blocks:
            self.tables[request_id][index] = block
        scheduled = plan.scheduled
        output = ModelRunnerOutput(plan.step_id, [], [], {}, {}, {}, 0.001)
        columns = (scheduled.request_ids, scheduled.num_computed_tokens, scheduled.num_scheduled_tokens,
                   scheduled.new_block_ids, scheduled.samples)  # fmt: skip
        for request_id, computed, count, new_blocks, samples in zip(*columns, strict=True):
            tokens, table = self.tokens[request_id], self.tables[request_id]
            table.extend(new_blocks)
            assert count > 0 and computed + count <= len(tokens), f"{request_id}: {computed}+{count} of {len(tokens)}"
            for position in range(computed, computed + count):
                slot = table[position // self.block_size], position % self.block_size
                self.memory[slot] = tuple(tokens[: position + 1])
            for position in range(computed + count):
                slot = table[position // self.block_size], position % self.block_size
                assert self.memory.get(slot) == tuple(tokens[: position + 1]), f"{request_id} reads a stale slot"
            if samples:
                assert computed + count == len(tokens), f"{request_id} samples at {computed + count} of {len(tokens)}"
                tokens.append(next_token(tokens))
                output.request_ids.append(request_id)
                output.sampled_token_ids.append(tokens[-1])
        return output


@pytest.fixture
def make_scheduler():
    def make(num_blocks: int = 100, block_size: int = 4, **config) -> Scheduler:
        config.setdefault("max_num_batched_tokens", 32)
        config.setdefault("max_num_seqs", 8)
        return Scheduler(SchedulerConfig(**config), KVCacheManager(num_blocks, block_size))

    return make


@pytest.fixture
def make_request():
    def make(request_id: str, prompt: list[int] | int, max_tokens: int = 4, **kwargs) -> Request:
        tokens = [ord(request_id[0]) % 50 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        params = kwargs.pop("params", None) or SamplingParams(max_tokens=max_tokens)
        return Request(request_id, tokens, params, max_model_len=400, **kwargs)

    return make
