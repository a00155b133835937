"""One step: plan in, tokens out. Pack, run the model, sample, remember the tokens.

Owns the input batch. Knows nothing of processes, of scheduling, or of how the model computes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from servd.attention.metadata import AttentionMetadata
from servd.outputs import KVShadowSample, ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from servd.worker.drafter import Drafter
from servd.worker.input_batch import InputBatch, PackedBatch, PromptTargets
from servd.worker.kv_cache import PagedKVCache
from servd.worker.kv_shadow import MAX_TOKENS, KVShadow
from servd.worker.pooling import Pooler
from servd.worker.sampler import Sampler
from servd.worker.sampling_metadata import SamplingMetadata
from servd.worker.structured_output import Guides

# Prompt logprobs need a [rows, vocab_size] array; so many rows at a time keep it small beside the weights.
PROMPT_LOGPROB_ROWS = 64


class RunnableModel(Protocol):
    """What the runner needs of a model (see servd.models)."""

    vocab_size: int

    def forward(
        self, input_ids: Tensor, positions: Tensor, attention: AttentionMetadata, kv_caches: list[Tensor]
    ) -> Tensor:
        """input_ids, positions [num_tokens] int64 → hidden [num_tokens, hidden]."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden] → [num_rows, vocab_size] float32."""


class StepReplay(Protocol):
    """Another way to run a step: CUDA graphs, or recorded native calls."""

    def run(self, packed: PackedBatch) -> Tensor | None:
        """Hidden states [num_tokens, hidden_size], valid until the next call; None: this step runs as usual."""


@dataclass(slots=True)
class _Sampled:
    """What the sampling rows of a step gave."""

    request_ids: list[str] = field(default_factory=list)  # without failed ones
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    num_accepted: list[int] = field(default_factory=list)  # drafts; empty: none were made
    kv_shadow: KVShadowSample | None = None


class ModelRunner:
    """Executes plans one after the other. The model and the cache lie on `device`; the batch's memory on the host."""

    def __init__(
        self,
        model: RunnableModel,
        kv_cache: PagedKVCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        replay: StepReplay | None = None,
        shadow: KVShadow | None = None,
        drafter: Drafter | None = None,
        tokenizer_path: Path | None = None,
    ) -> None:
        """`replay`: another way to run steps; `shadow`: what compares some steps with an unquantized cache;
        `drafter`: what guesses ahead where plans allow it; `tokenizer_path`: the tokenizer.json that grammars need.
        """
        self.model = model
        self.kv_cache = kv_cache
        self.device = device
        guides = Guides(model.vocab_size, tokenizer_path)
        self.batch = InputBatch(max_num_seqs, max_model_len, kv_cache.block_size, model.vocab_size, guides, drafter)
        self.sampler = Sampler(device)
        self._pooler = Pooler()
        self._drafter = drafter
        self._replay = replay
        self._shadow = shadow

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step.

        The plan's changes to requests and blocks are taken in before anything can fail, so that a step that raises
        leaves the batch in step with the plans; only its tokens are then missing, and requests planned beyond them
        are reported in `failed`. A request that cannot be computed is in `failed` and in no other field.
        """
        began = time.perf_counter()
        self.batch.apply(plan)
        self._pooler.apply(plan)
        self.kv_cache.copy_blocks(plan.block_copies)
        packed = self.batch.pack(plan.scheduled)
        sampled = _Sampled()
        prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        embeddings: dict[str, bytes] = {}
        if packed.request_ids:
            hidden = self._forward(packed)
            for targets in packed.prompt_targets:
                prompt_logprobs[targets.request_id] = self._prompt_logprobs(hidden, targets)
            embeddings = self._pooler.pool(packed, hidden, self.batch.fail)
            if packed.sample_request_ids:
                sampled = self._sample(hidden, packed, plan.step_id)
        seconds = time.perf_counter() - began
        if self._drafter is not None and 0 < len(packed.input_ids) == len(packed.sample_indices):
            self._drafter.cost.observe(len(packed.input_ids), seconds)
        failed = {r: self.batch.failed[r] for r in plan.scheduled.request_ids if r in self.batch.failed}
        return ModelRunnerOutput(
            step_id=plan.step_id,
            request_ids=sampled.request_ids,
            sampled_token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            prompt_logprobs={r: found for r, found in prompt_logprobs.items() if r not in failed},
            failed=failed,
            compute_seconds=seconds,
            kv_shadow=sampled.kv_shadow,
            num_draft_tokens=packed.num_drafts,
            num_accepted_tokens=sampled.num_accepted,
            embeddings=embeddings,
        )

    def _forward(self, packed: PackedBatch) -> Tensor:
        hidden = self._replay.run(packed) if self._replay is not None else None
        if hidden is not None:
            return hidden
        input_ids, positions = self._tensor(packed.input_ids), self._tensor(packed.positions)
        return self.model.forward(input_ids, positions, self._attention(packed), self.kv_cache.layers)

    def _attention(self, packed: PackedBatch) -> AttentionMetadata:
        return AttentionMetadata(
            cu_seqlens_q=self._tensor(packed.cu_seqlens_q),
            seq_lens=self._tensor(packed.seq_lens),
            block_tables=self._tensor(packed.block_tables),
            slot_mapping=self._tensor(packed.slot_mapping),
        )

    def _sample(self, hidden: Tensor, packed: PackedBatch, step_id: int) -> _Sampled:
        logits = self.model.compute_logits(hidden[self._tensor(packed.sample_indices)])
        sampling, deferred = self._constrain(packed)
        output = self.sampler(logits, sampling)
        firsts = packed.sample_bounds[:-1]
        for request_id, first in zip(packed.sample_request_ids, firsts.tolist(), strict=True):
            if first in output.failed:
                self.batch.fail(request_id, output.failed[first])
        alive = np.array([request_id not in self.batch.failed for request_id in packed.sample_request_ids], np.bool_)
        alive[deferred] = False
        num_right = self.batch.num_right(packed, output.token_ids, list(output.failed))
        counts = np.where(alive, 1 + num_right, 0)  # tokens of each request
        kept = np.arange(counts.sum()) + np.repeat(firsts - np.cumsum(counts) + counts, counts)
        self.batch.append_tokens(packed.sample_rows[kept], packed.sample_positions[kept], output.token_ids[kept])
        logprobs: dict[str, list[TokenLogprobs]] = {}
        for request_id, first, count in zip(packed.sample_request_ids, firsts.tolist(), counts.tolist(), strict=True):
            if entries := [entry for entry in output.logprobs[first : first + count] if entry is not None]:
                logprobs[request_id] = entries
        return _Sampled(
            request_ids=[packed.sample_request_ids[i] for i in np.flatnonzero(alive)],
            token_ids=output.token_ids[kept].tolist(),
            logprobs=logprobs,
            num_accepted=num_right[alive].tolist() if packed.num_drafts else [],
            kv_shadow=self._compare(step_id, packed, logits, firsts[alive].tolist()),
        )

    def _constrain(self, packed: PackedBatch) -> tuple[SamplingMetadata, list[int]]:
        """The settings with masks, and the indices of sampling requests that get no token: theirs are not ready."""
        if packed.masks is None:
            return packed.sampling, []
        masks = packed.masks.collect(is_alone=len(packed.masks.entries) == len(packed.request_ids))
        for i, reason in masks.failed.items():
            self.batch.fail(packed.sample_request_ids[i], reason, level=logging.WARNING)
        return dataclasses.replace(packed.sampling, allowed=masks.allowed), masks.deferred

    def _compare(self, step_id: int, packed: PackedBatch, logits: Tensor, rows: list[int]) -> KVShadowSample | None:
        """One of the sampled `rows`, another one each time, against an unquantized cache."""
        short = [row for row in rows if packed.sample_positions[row] <= MAX_TOKENS]
        if self._shadow is None or not short or not self._shadow.is_due(step_id):
            return None
        row = short[step_id % len(short)]
        request_id = packed.sample_request_ids[int(np.searchsorted(packed.sample_bounds, row))]
        return self._shadow.compare(self.batch.token_ids(request_id)[: packed.sample_positions[row]], logits[row])

    def _prompt_logprobs(self, hidden: Tensor, targets: PromptTargets) -> list[TokenLogprobs]:
        found: list[TokenLogprobs] = []
        for begin in range(0, len(targets.token_ids), PROMPT_LOGPROB_ROWS):
            token_ids = targets.token_ids[begin : begin + PROMPT_LOGPROB_ROWS]
            first = targets.first_index + begin
            logits = self.model.compute_logits(hidden[first : first + len(token_ids)])
            output = self.sampler.report(logits, token_ids, targets.num_top)
            for reason in output.failed.values():
                self.batch.fail(targets.request_id, f"{reason} (in the prompt)")
                return []
            found += [entry for entry in output.logprobs if entry is not None]
        return found

    def _tensor(self, values: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)
