"""Masks of what constrained requests may be given, made on threads of their own while the model runs.

Owns guides by row of the input batch. A request whose grammar or mask is not ready in time gets no token in that step,
and is planned again; the others never wait for it. Knows nothing of logits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLTokenizer

from servd.grammar import GrammarError, compile_grammar, fill_mask, load_vocabulary
from servd.outputs import NewRequestData
from servd.worker.forbidden_texts import ForbiddenTexts, Int32s, TokenBytes
from servd.worker.guide import Constraints, Guide

logger = logging.getLogger(__name__)

SLOW_SECONDS = 0.002  # a mask that takes longer is made apart, so that others do not queue behind it
MASKS_PER_THREAD = 8  # fewer are not worth a thread
MAX_MASK_THREADS = 8
PATIENCE = 0.02  # seconds that a step waits for its masks, once the model has run; all of them take 5 ms at 64 rows
PATIENCE_ALONE = 0.05  # if nobody at all would get anything from the step


@dataclass(slots=True)
class _Job:
    """The masks of one request in one step."""

    guide: Guide
    answer: list[int]  # its tokens so far
    drafts: list[int]
    masks: Int32s  # [1 + num_drafts, num_words]
    error: str | None = None
    seconds: float = 0.0
    is_done: bool = False

    def run(self) -> None:
        began = time.perf_counter()
        try:
            self.guide.fill(self.answer, self.drafts, self.masks)
        except GrammarError as error:
            self.error = f"its grammar cannot be followed further: {error}"
        except Exception as error:
            logger.exception("a mask failed")
            self.error = f"its mask failed: {type(error).__name__}: {error}"
        self.seconds = time.perf_counter() - began
        self.is_done = True


@dataclass(slots=True)
class _Entry:
    """A constrained request."""

    new: NewRequestData
    constraints: Future[Constraints]
    guide: Guide | None = None
    job: _Job | None = None  # begun, and not used yet
    making: Future[None] | None = None  # of the job
    is_slow: bool = False

    @property
    def has_masks(self) -> bool:
        """Whether it can get a token."""
        return self.job is not None and self.job.is_done

    @property
    def awaited(self) -> Future[Any]:
        """What must be done before it can get one."""
        return self.constraints if self.making is None else self.making


@dataclass(slots=True)
class Masks:
    """What a step's sampler must know of constrained requests, by index of the sampling requests."""

    allowed: Int32s  # [num_samples, num_words]
    deferred: list[int]  # not ready: whatever is sampled for them does not count
    failed: dict[int, str]


@dataclass(slots=True)
class StepMasks:
    """Masks in the making. `bounds` [num_sampling_reqs + 1] are on the sample axis; `entries` by sampling request."""

    bounds: list[int]
    num_words: int
    entries: dict[int, _Entry] = field(default_factory=dict)
    quick: list[Future[None]] = field(default_factory=list)

    def collect(self, *, is_alone: bool) -> Masks:
        """Wait a moment for what is not there. `is_alone`: these requests are all that the step holds."""
        wait(self.quick, PATIENCE)
        if is_alone and not any(entry.has_masks for entry in self.entries.values()):
            wait([entry.awaited for entry in self.entries.values()], PATIENCE_ALONE, FIRST_COMPLETED)
        masks = Masks(np.full((self.bounds[-1], self.num_words), -1, np.int32), [], {})
        for i, entry in self.entries.items():
            job = entry.job
            failure = _failure_of(entry)
            if failure is not None:
                masks.failed[i] = failure
            elif job is None or not entry.has_masks:
                masks.deferred.append(i)
            else:
                first, last = self.bounds[i], self.bounds[i + 1]
                masks.allowed[first:last] = job.masks[: last - first]
                entry.job, entry.is_slow = None, job.seconds > SLOW_SECONDS * (last - first)
        return masks


def _failure_of(entry: _Entry) -> str | None:
    if entry.constraints.done() and (error := entry.constraints.exception()) is not None:
        return f"its grammar cannot be compiled: {error}"
    return entry.job.error if entry.job is not None and entry.job.is_done else None


class Guides:
    """The constrained requests among the rows of an InputBatch. Called from the worker's thread alone."""

    def __init__(self, vocab_size: int, tokenizer_path: Path | None) -> None:
        """`tokenizer_path`: of a tokenizer.json; None: only `allowed_token_ids` can be served."""
        self.num_words = -(-vocab_size // 32)
        self._compiler = _Compiler(vocab_size, tokenizer_path)
        self._entries: dict[int, _Entry] = {}
        self._building = ThreadPoolExecutor(1, thread_name_prefix="servd-grammar")
        self._num_mask_threads = max(1, min(MAX_MASK_THREADS, torch.get_num_threads() // 2))
        self._quick = ThreadPoolExecutor(self._num_mask_threads, thread_name_prefix="servd-masks")
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="servd-slow-masks")

    def add(self, row: int, new: NewRequestData) -> None:
        """Follow the request in `row`, if it is constrained; its grammar is compiled meanwhile."""
        if new.sampling_params.is_constrained:
            self._entries[row] = _Entry(new, self._building.submit(self._compiler.build, new))

    def forget(self, row: int) -> None:
        """The row's request is gone."""
        entry = self._entries.pop(row, None)
        if entry is not None:
            entry.constraints.cancel()

    def __contains__(self, row: int) -> bool:
        return row in self._entries

    def may_draft(self, row: int) -> bool:
        """Whether guesses of the row can be judged in this step: not while an earlier mask of it is in the making."""
        entry = self._entries.get(row)
        return entry is None or (entry.job is None and entry.constraints.done())

    def forced(self, row: int, tokens: Int32s, num_tokens: int) -> list[int]:
        """What the row's grammar leaves no choice about behind its `num_tokens` known tokens; often empty."""
        entry = self._entries.get(row)
        if entry is None or entry.guide is None or entry.job is not None or entry.is_slow:
            return []
        try:
            return entry.guide.forced(tokens[row, entry.new.num_prompt_tokens : num_tokens].tolist())
        except GrammarError:
            return []  # its mask will say so

    def begin(
        self, rows: Sequence[int], bounds: list[int], tokens: Int32s, num_tokens: Sequence[int]
    ) -> StepMasks | None:
        """Start on the masks of the sampling requests in `rows`; None if none of them is constrained.

        `bounds` [num_reqs + 1] are on the sample axis; `tokens` [all rows, max_model_len + 1] holds `num_tokens`
        [num_reqs] known tokens a row, and its guesses behind them.
        """
        step = StepMasks(bounds, self.num_words)
        quick: list[_Entry] = []
        for i, row in enumerate(rows):
            entry = self._entries.get(row)
            if entry is None:
                continue
            step.entries[i] = entry
            if entry.guide is None and entry.constraints.done() and entry.constraints.exception() is None:
                entry.guide = Guide(entry.new, entry.constraints.result(), self.num_words)
            if entry.guide is None or entry.job is not None:
                continue
            end, num_drafts = num_tokens[i], bounds[i + 1] - bounds[i] - 1
            answer = tokens[row, entry.new.num_prompt_tokens : end].tolist()
            drafts = tokens[row, end : end + num_drafts].tolist()
            entry.job = _Job(entry.guide, answer, drafts, np.full((1 + num_drafts, self.num_words), -1, np.int32))
            if entry.is_slow:
                entry.making = self._slow.submit(entry.job.run)
            else:
                quick.append(entry)
        num_parts = min(self._num_mask_threads, -(-len(quick) // MASKS_PER_THREAD))
        for part in range(num_parts):
            share = quick[part::num_parts]
            making = self._quick.submit(_run_all, [entry.job for entry in share if entry.job is not None])
            step.quick.append(making)
            for entry in share:
                entry.making = making
        return step if step.entries else None


def _run_all(jobs: list[_Job]) -> None:
    for job in jobs:
        job.run()


class _Compiler:
    """Makes constraints, on one thread.

    Each request gets a matcher compiled for it (1 ms for most): copies of one share the library's lexer, so that a
    request could use up the states that another one needs, and would fail or not depending on who ran before.
    """

    def __init__(self, vocab_size: int, tokenizer_path: Path | None) -> None:
        self._vocab_size = vocab_size
        self._tokenizer_path = tokenizer_path
        self._eos_token_ids: list[int] = []

    def build(self, new: NewRequestData) -> Constraints:
        """Raises GrammarError."""
        params = new.sampling_params
        self._eos_token_ids = new.eos_token_ids  # of every request the same
        constraints = Constraints()
        if params.guidance is not None:
            constraints.matcher = compile_grammar(params.guidance, self._vocabulary)
            # The first mask takes longest, and is found again.
            fill_mask(constraints.matcher, np.zeros(-(-self._vocab_size // 32), np.int32))
        if params.bad_words:
            constraints.forbidden = ForbiddenTexts(params.bad_words, self._token_bytes)
        return constraints

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        if self._tokenizer_path is None:
            raise GrammarError("this worker has no tokenizer")
        return load_vocabulary(self._tokenizer_path, self._vocab_size, self._eos_token_ids)

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._vocabulary)
