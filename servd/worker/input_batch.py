"""The worker's memory of running requests, one row each: tokens, block table, sampling settings; and the packed step.

Owns what plans leave out because the worker knows it. Knows nothing of the model; all of it is NumPy on the host.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servd.outputs import NewRequestData, ScheduledRequests, SchedulerOutput
from servd.worker.drafter import Drafter
from servd.worker.sampling_metadata import SamplingMetadata, SamplingRows
from servd.worker.structured_output import Guides, StepMasks

logger = logging.getLogger(__name__)

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PromptTargets:
    """Prompt tokens of one request whose logprobs this step gives."""

    request_id: str
    first_index: int  # on the packed token axis: the position whose logits foretell the first target
    token_ids: Int64s  # [num_targets]
    num_top: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One step, without padding; requests in batch order, those that cannot be computed left out."""

    request_ids: list[str]  # [num_reqs]
    input_ids: Int64s  # [num_tokens]
    positions: Int64s  # [num_tokens]
    cu_seqlens_q: Int32s  # [num_reqs + 1]
    seq_lens: Int32s  # [num_reqs]
    block_tables: Int32s  # [num_reqs, max_blocks] as wide as the longest of these needs
    slot_mapping: Int64s  # [num_tokens]
    sample_request_ids: list[str]  # [num_sampling_reqs]
    sample_bounds: Int64s  # [num_sampling_reqs + 1] on the sample axis: the last known token of each, then its drafts
    sample_rows: Int64s  # [num_samples] rows of the InputBatch
    sample_indices: Int64s  # [num_samples] on the packed token axis
    sample_positions: Int64s  # [num_samples] where the sampled tokens go
    sampling: SamplingMetadata  # of the sampling rows
    masks: StepMasks | None  # in the making; None: no request that samples is constrained
    prompt_targets: list[PromptTargets]

    @property
    def num_drafts(self) -> int:
        """Guessed tokens among these."""
        return len(self.sample_rows) - len(self.sample_request_ids)


class InputBatch:
    """Rows of running requests. `failed` holds those that cannot be computed, with the reason, until they are dropped.

    A request that is wrong in itself fails alone: it is marked, and left out of every later step.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        guides: Guides,
        drafter: Drafter | None = None,
    ) -> None:
        """`guides`: follow constrained requests. `drafter`: guesses ahead where plans allow it; None: nobody does."""
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.failed: dict[str, str] = {}
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(max_num_seqs))[::-1]
        # One more than max_model_len: the token sampled after the last position has to go somewhere.
        self._tokens = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self._num_tokens = np.zeros(max_num_seqs, np.int64)
        self._max_total_tokens = np.zeros(max_num_seqs, np.int64)
        max_blocks = -(-(max_model_len + 1) // block_size)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self._num_blocks = np.zeros(max_num_seqs, np.int64)
        self._num_prompt_logprobs = np.full(max_num_seqs, -1, np.int64)  # -1: none asked for
        self._sampling = SamplingRows(max_num_seqs, vocab_size)
        self._guides = guides
        self._drafter = drafter

    @property
    def num_requests(self) -> int:
        """Rows in use."""
        return len(self._row_of)

    def token_ids(self, request_id: str) -> list[int]:
        """All tokens that are known of a request."""
        row = self._row_of[request_id]
        return [int(token_id) for token_id in self._tokens[row, : self._num_tokens[row]]]

    def apply(self, plan: SchedulerOutput) -> None:
        """Take in what the plan says of requests: those to forget, new ones, and changes of block tables."""
        for request_id in plan.dropped_request_ids:
            self.remove(request_id)
        for new in plan.new_requests:
            self.add(new)
        scheduled = plan.scheduled
        for request_id, block_ids in zip(scheduled.request_ids, scheduled.new_block_ids, strict=True):
            row = self._row_of.get(request_id)
            if block_ids and row is not None:
                self._append_blocks(request_id, row, block_ids)
        for request_id, index, block_id in plan.replaced_blocks:
            row = self._row_of.get(request_id)
            if row is not None:
                assert index < self._num_blocks[row], f"{request_id} has no block {index} to replace"
                self._block_tables[row, index] = block_id

    def add(self, new: NewRequestData) -> None:
        """Give a request a row; one that is already known starts over."""
        self.remove(new.request_id)
        reason = self._refusal(new)
        if reason is not None:
            self.fail(new.request_id, reason)
            return
        row = self._free_rows.pop()
        self._row_of[new.request_id] = row
        self._num_tokens[row] = len(new.token_ids)
        self._tokens[row, : len(new.token_ids)] = new.token_ids
        self._max_total_tokens[row] = new.max_total_tokens
        self._num_blocks[row] = 0
        self._block_tables[row] = 0
        self._append_blocks(new.request_id, row, new.block_ids)
        wanted = new.sampling_params.prompt_logprobs
        self._num_prompt_logprobs[row] = -1 if wanted is None else wanted
        self._sampling.set(row, new)
        self._guides.add(row, new)

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ones are none of our business (it may have failed before it had a row)."""
        self.failed.pop(request_id, None)
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free_rows.append(row)
            self._guides.forget(row)
            if self._drafter is not None:
                self._drafter.forget(row)

    def fail(self, request_id: str, reason: str, *, level: int = logging.ERROR) -> None:
        """Leave a request out of all steps until it is dropped."""
        if request_id not in self.failed:
            logger.log(level, "request %s: %s", request_id, reason)
            self.failed[request_id] = reason

    def append_tokens(self, rows: Int64s, positions: Int64s, token_ids: Int64s) -> None:
        """Write sampled tokens at their positions; all arrays [num_samples]; each row's last one is its newest."""
        self._tokens[rows, positions] = token_ids
        self._num_tokens[rows] = positions + 1

    def pack(self, scheduled: ScheduledRequests) -> PackedBatch:
        """The step's flat arrays. Requests that cannot be computed are marked as failed and left out."""
        live = self._live_indices(scheduled)
        request_ids = [scheduled.request_ids[i] for i in live]
        rows = np.array([self._row_of[request_id] for request_id in request_ids], np.int64)
        counts = np.array([scheduled.num_scheduled_tokens[i] for i in live], np.int64)
        samples = np.array([scheduled.samples[i] for i in live], np.bool_)
        starts = np.array([scheduled.num_computed_tokens[i] for i in live], np.int64)
        # What samples ends at the last known token, and drafts may have brought it further than the plan knows.
        starts = np.where(samples, self._num_tokens[rows] - counts, starts)
        num_drafts = self._draft(scheduled, live, rows, samples)
        ends = starts + counts + num_drafts
        cu_seqlens_q = np.zeros(len(live) + 1, np.int64)
        np.cumsum(ends - starts, out=cu_seqlens_q[1:])
        token_rows = np.repeat(rows, ends - starts)
        positions = np.arange(cu_seqlens_q[-1]) + np.repeat(starts - cu_seqlens_q[:-1], ends - starts)
        blocks = self._block_tables[token_rows, positions // self.block_size].astype(np.int64)
        width = -(-int(ends.max(initial=0)) // self.block_size)
        num_samples = np.where(samples, 1 + num_drafts, 0)
        sample_rows = np.repeat(rows, num_samples)
        last = np.cumsum(num_samples)
        sample_indices = np.arange(len(sample_rows)) + np.repeat(cu_seqlens_q[1:] - last, num_samples)
        sample_positions = positions[sample_indices] + 1
        sample_bounds = np.concatenate([[0], last[samples]])
        return PackedBatch(
            request_ids=request_ids,
            input_ids=self._tokens[token_rows, positions].astype(np.int64),
            positions=positions,
            cu_seqlens_q=cu_seqlens_q.astype(np.int32),
            seq_lens=ends.astype(np.int32),
            block_tables=self._block_tables[rows, :width],
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            sample_request_ids=[request_ids[i] for i in np.flatnonzero(samples)],
            sample_bounds=sample_bounds,
            sample_rows=sample_rows,
            sample_indices=sample_indices,
            sample_positions=sample_positions,
            sampling=self._sampling.metadata(sample_rows, sample_positions, self._tokens),
            masks=self._guides.begin(
                rows[samples].tolist(), sample_bounds.tolist(), self._tokens, self._num_tokens[rows[samples]].tolist()
            ),
            prompt_targets=self._prompt_targets(request_ids, rows, starts, ends, cu_seqlens_q),
        )

    def _draft(
        self, scheduled: ScheduledRequests, live: list[int], rows: Int64s, samples: npt.NDArray[np.bool_]
    ) -> Int64s:
        """Guess behind the last tokens of those that sample; [num_live] how many tokens were written there."""
        counts = np.zeros(len(live), np.int64)
        if self._drafter is not None and scheduled.num_draft_tokens:
            granted = np.array([scheduled.num_draft_tokens[i] for i in live], np.int64)[samples]
            rows = rows[samples]
            num_tokens = self._num_tokens[rows]
            most = np.minimum(granted, self._max_total_tokens[rows] - num_tokens - 1)
            most[[not self._guides.may_draft(row) for row in rows.tolist()]] = 0
            counts[samples] = self._drafter.draft(rows, most, self._tokens, num_tokens)
            self._draft_forced(rows, np.flatnonzero(samples), most, counts)
        return counts

    def _draft_forced(self, rows: Int64s, indices: Int64s, most: Int64s, counts: Int64s) -> None:
        """Put what grammars force in the place of guesses that do not begin so: they are computed in any case."""
        for i, row, room in zip(indices.tolist(), rows.tolist(), most.tolist(), strict=True):
            if room > 0 and row in self._guides:
                end = int(self._num_tokens[row])
                forced = self._guides.forced(row, self._tokens, end)[:room]
                if self._tokens[row, end : end + min(len(forced), counts[i])].tolist() != forced:
                    self._tokens[row, end : end + len(forced)] = forced
                    counts[i] = len(forced)

    def num_right(self, packed: PackedBatch, token_ids: Int64s, failed: list[int]) -> Int64s:
        """[num_sampling_reqs] how many drafts of each request are what was sampled in their place.

        `token_ids` [num_samples] and the `failed` samples are the sampler's. What comes before a failed one is kept, so
        that the failure comes again as a request's first sample, as it would without drafts.
        """
        is_last = token_ids != self._tokens[packed.sample_rows, packed.sample_positions]
        is_last[packed.sample_bounds[1:] - 1] = True  # no draft lies behind these
        is_last[np.array(failed, np.int64) - 1] = True
        last, first = np.flatnonzero(is_last), packed.sample_bounds[:-1]
        return last[np.searchsorted(last, first)] - first

    def _append_blocks(self, request_id: str, row: int, block_ids: list[int]) -> None:
        begin = int(self._num_blocks[row])
        end = begin + len(block_ids)
        if end > self._block_tables.shape[1]:
            self.fail(request_id, f"{end} KV blocks are more than max_model_len {self.max_model_len} needs")
            return
        self._block_tables[row, begin:end] = block_ids
        self._num_blocks[row] = end

    def _refusal(self, new: NewRequestData) -> str | None:
        """Why a request cannot have a row, or None."""
        if not self._free_rows:
            return "the worker has no free row: more requests run than max_num_seqs allows"
        if not 0 < len(new.token_ids) <= self.max_model_len:
            return f"it has {len(new.token_ids)} tokens; allowed: 1 to {self.max_model_len}"
        if min(new.token_ids) < 0 or max(new.token_ids) >= self.vocab_size:
            return f"it holds a token id out of the model's vocabulary; allowed: 0 to {self.vocab_size - 1}"
        return None

    def _live_indices(self, scheduled: ScheduledRequests) -> list[int]:
        """Indices of the plan's requests that can be computed; marks the others."""
        live = []
        for i, request_id in enumerate(scheduled.request_ids):
            if request_id in self.failed:
                continue
            end = scheduled.num_computed_tokens[i] + scheduled.num_scheduled_tokens[i]
            row = self._row_of.get(request_id)
            if row is None:
                self.fail(request_id, "the worker does not know it")
                continue
            num_tokens, num_blocks = int(self._num_tokens[row]), int(self._num_blocks[row])
            if end > num_tokens and not (scheduled.samples[i] and row in self._guides):
                # Expected in the step behind one that raised: the engine replays both. (A constrained request may have
                # got no token in the step before: its last known token is computed again.)
                self.fail(request_id, f"tokens up to {end} are planned, {num_tokens} are known", level=logging.DEBUG)
                continue
            if scheduled.samples[i]:
                room = int(self._max_total_tokens[row]) - num_tokens - 1
                if room < 0:
                    continue  # drafts brought its last token after this was planned
                end = num_tokens + min(room, scheduled.num_draft_tokens[i] if scheduled.num_draft_tokens else 0)
            if end > num_blocks * self.block_size:
                self.fail(request_id, f"{num_blocks} KV blocks do not hold {end} tokens")
            else:
                live.append(i)
        return live

    def _prompt_targets(
        self, request_ids: list[str], rows: Int64s, starts: Int64s, ends: Int64s, cu_seqlens_q: Int64s
    ) -> list[PromptTargets]:
        """Position p foretells prompt token p + 1; the last prompt position foretells no prompt token."""
        targets = []
        wanted = self._num_prompt_logprobs[rows]
        for i in np.flatnonzero(wanted >= 0).tolist():
            row, start = int(rows[i]), int(starts[i])
            end = min(int(ends[i]), int(self._sampling.num_prompt_tokens[row]) - 1)
            if start < end:
                token_ids = self._tokens[row, start + 1 : end + 1].astype(np.int64)
                targets.append(PromptTargets(request_ids[i], int(cu_seqlens_q[i]), token_ids, int(wanted[i])))
        return targets
