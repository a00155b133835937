"""Sampling settings as arrays: one persistent row for each running request, and the slice that a step's sampler reads.

Owns no tokens and no logits; knows nothing of how a setting is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servd.outputs import NewRequestData

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
GREEDY_BELOW = 1e-5  # vLLM's limit: a lower temperature would only overflow on its way to the same token


@dataclass(frozen=True, slots=True)
class SparseValues:
    """Values at (row, token id) of a [num_rows, vocab_size] array."""

    rows: Ints  # [num_values]
    token_ids: Ints  # [num_values]
    values: Floats  # [num_values]


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """All tokens so far of the rows that have a penalty, flat."""

    rows: Ints  # [num_penalty_rows] which rows
    index: Ints  # [num_history_tokens] index into `rows` of each token
    token_ids: Ints  # [num_history_tokens]
    is_output: npt.NDArray[np.bool_]  # [num_history_tokens] false for the prompt's
    repetition: Floats  # [num_penalty_rows]
    presence: Floats  # [num_penalty_rows]
    frequency: Floats  # [num_penalty_rows]


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """What the sampler must know of the rows of one step; row i of the logits is row i here."""

    temperature: Floats  # [num_rows] 0: greedy
    top_k: Ints  # [num_rows] 0: all
    top_p: Floats  # [num_rows]
    min_p: Floats  # [num_rows]
    seeds: npt.NDArray[np.uint64]  # [num_rows]
    positions: Ints  # [num_rows] absolute position of the token to be sampled
    num_logprobs: Ints  # [num_rows] alternatives to report; -1: no logprobs at all
    logit_bias: SparseValues | None
    forbidden: SparseValues | None  # stop ids of rows below min_tokens; the values are -inf
    history: TokenHistory | None  # None: no row has a penalty

    @property
    def is_plain_greedy(self) -> bool:
        """One argmax is all there is to do."""
        extras = self.logit_bias is not None or self.forbidden is not None or self.history is not None
        return not extras and not self.temperature.any() and bool((self.num_logprobs < 0).all())


class SamplingRows:
    """The persistent sampling settings, by row of the input batch."""

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.temperature = np.zeros(num_rows)
        self.top_k = np.zeros(num_rows, np.int64)
        self.top_p = np.ones(num_rows)
        self.min_p = np.zeros(num_rows)
        self.repetition = np.ones(num_rows)
        self.presence = np.zeros(num_rows)
        self.frequency = np.zeros(num_rows)
        self.seeds = np.zeros(num_rows, np.uint64)
        self.num_logprobs = np.full(num_rows, -1, np.int64)
        self.num_prompt_tokens = np.zeros(num_rows, np.int64)
        self.min_tokens = np.zeros(num_rows, np.int64)
        self._bias: dict[int, tuple[Ints, Floats]] = {}  # only rows that have one
        self._stop_token_ids: dict[int, Ints] = {}  # only rows with min_tokens

    def set(self, row: int, new: NewRequestData) -> None:
        """Take the settings of a request into `row`."""
        params = new.sampling_params
        self.temperature[row] = params.temperature if params.temperature >= GREEDY_BELOW else 0.0
        self.top_k[row], self.top_p[row], self.min_p[row] = params.top_k, params.top_p, params.min_p
        self.repetition[row] = params.repetition_penalty
        self.presence[row], self.frequency[row] = params.presence_penalty, params.frequency_penalty
        self.seeds[row] = new.seed & 0xFFFF_FFFF_FFFF_FFFF  # seeds may be negative; philox wants 64 bits
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.num_prompt_tokens[row] = new.num_prompt_tokens
        self.min_tokens[row] = params.min_tokens
        self._bias.pop(row, None)
        self._stop_token_ids.pop(row, None)
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias.keys(), np.int64)
            self._bias[row] = (ids, np.fromiter(params.logit_bias.values(), np.float64))
        stop_ids = [token_id for token_id in new.stop_token_ids if 0 <= token_id < self.vocab_size]
        if params.min_tokens and stop_ids:
            self._stop_token_ids[row] = np.unique(np.array(stop_ids, np.int64))

    def metadata(self, rows: Ints, positions: Ints, token_table: npt.NDArray[np.int32]) -> SamplingMetadata:
        """The settings of `rows` [num_rows], whose next tokens go to `positions` [num_rows] of `token_table`."""
        return SamplingMetadata(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seeds=self.seeds[rows],
            positions=positions,
            num_logprobs=self.num_logprobs[rows],
            logit_bias=self._logit_bias(rows),
            forbidden=self._forbidden(rows, positions),
            history=self._history(rows, positions, token_table),
        )

    def _logit_bias(self, rows: Ints) -> SparseValues | None:
        found = [(i, *self._bias[row]) for i, row in enumerate(rows.tolist()) if row in self._bias]
        return _sparse(found) if found else None

    def _forbidden(self, rows: Ints, positions: Ints) -> SparseValues | None:
        if not self._stop_token_ids:
            return None
        num_output_tokens = positions - self.num_prompt_tokens[rows]
        found = []
        for i in np.flatnonzero(num_output_tokens < self.min_tokens[rows]).tolist():
            ids = self._stop_token_ids.get(int(rows[i]))
            if ids is not None:
                found.append((i, ids, np.full(len(ids), -np.inf)))
        return _sparse(found) if found else None

    def _history(self, rows: Ints, positions: Ints, token_table: npt.NDArray[np.int32]) -> TokenHistory | None:
        repetition, presence, frequency = self.repetition[rows], self.presence[rows], self.frequency[rows]
        with_penalty = np.flatnonzero((repetition != 1.0) | (presence != 0.0) | (frequency != 0.0))
        if not len(with_penalty):
            return None
        lengths = positions[with_penalty]
        index = np.repeat(np.arange(len(with_penalty)), lengths)
        offsets = np.arange(len(index)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        table_rows = rows[with_penalty]
        return TokenHistory(
            rows=with_penalty,
            index=index,
            token_ids=token_table[table_rows[index], offsets].astype(np.int64),
            is_output=offsets >= self.num_prompt_tokens[table_rows][index],
            repetition=repetition[with_penalty],
            presence=presence[with_penalty],
            frequency=frequency[with_penalty],
        )


def _sparse(parts: Sequence[tuple[int, Ints, Floats]]) -> SparseValues:
    return SparseValues(
        rows=np.repeat(np.array([row for row, _, _ in parts], np.int64), [len(ids) for _, ids, _ in parts]),
        token_ids=np.concatenate([ids for _, ids, _ in parts]),
        values=np.concatenate([values for _, _, values in parts]),
    )
