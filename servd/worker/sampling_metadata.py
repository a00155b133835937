"""Sampling settings as arrays: one persistent row for each running request, and the slice that a step's sampler reads.

Owns no tokens and no logits; knows nothing of how a setting is applied.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from servd_kernels.sample import LogitBias, SampleParams, TokenHistory

from servd.outputs import NewRequestData

Int32s = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
GREEDY_BELOW = 1e-5  # vLLM's limit: a lower temperature would only overflow on its way to the same token


@dataclass(frozen=True, slots=True)
class RowValues:
    """Values at (row, token id) of a [num_rows, vocab_size] array; row i owns offsets[i] to offsets[i + 1]."""

    offsets: Int32s  # [num_rows + 1]
    token_ids: Int32s  # [num_values]
    values: npt.NDArray[np.float32]  # [num_values]


@dataclass(frozen=True, slots=True)
class RowTokens:
    """All tokens so far of the rows that have a penalty; row i owns offsets[i] to offsets[i + 1]."""

    offsets: Int32s  # [num_rows + 1]
    token_ids: Int32s  # [num_tokens]


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """What the sampler must know of the rows of one step, on the host; row i of the logits is row i here."""

    floats: Floats  # [6, num_rows] see SamplingRows
    ints: Ints  # [4, num_rows] see SamplingRows
    positions: Ints  # [num_rows] absolute position of the token to be sampled
    bias: RowValues | None  # logit_bias, and -inf for the stop ids of rows below min_tokens
    history: RowTokens | None  # None: no row has a penalty
    allowed: Int32s | None = None  # [num_rows, ceil(vocab_size / 32)] masks; None: no row is constrained

    def params(self, device: torch.device) -> SampleParams:
        """The same on `device`: arrays travel whole, and are cut up there."""

        def put(values: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        temperature, top_p, min_p, *penalties = put(self.floats).unbind()
        top_k, seeds, num_logprobs, num_prompt_tokens, positions = put(np.vstack([self.ints, self.positions])).unbind()
        bias = history = None
        if self.bias is not None:
            bias = LogitBias(put(self.bias.offsets), put(self.bias.token_ids), put(self.bias.values))
        if self.history is not None:
            repetition, presence, frequency = (values.float() for values in penalties)
            history = TokenHistory(
                put(self.history.offsets),
                put(self.history.token_ids),
                num_prompt_tokens.int(),
                repetition=repetition,
                presence=presence,
                frequency=frequency,
            )
        max_logprobs = int(self.ints[2].max(initial=-1))
        allowed = None if self.allowed is None else put(self.allowed)
        return SampleParams(
            temperature, top_p, min_p, top_k, seeds, positions, num_logprobs, max_logprobs, bias, history, allowed
        )


def given_tokens(token_ids: Ints, num_top: int, device: torch.device) -> SampleParams:
    """Settings that choose nothing, and report on `token_ids` [num_rows] with `num_top` alternatives each."""
    given = torch.from_numpy(token_ids).to(device)
    ones, zeros = torch.ones_like(given, dtype=torch.float64), torch.zeros_like(given)
    return SampleParams(
        temperature=ones,
        top_p=ones,
        min_p=torch.zeros_like(ones),
        top_k=zeros,
        seeds=zeros,
        positions=zeros,
        num_logprobs=zeros + num_top,
        max_logprobs=num_top,
        given=given.int(),
    )


class SamplingRows:
    """The persistent sampling settings, by row of the input batch."""

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._floats = np.zeros((6, num_rows))
        self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency = self._floats
        self._ints = np.zeros((4, num_rows), np.int64)
        self.top_k, self.seeds, self.num_logprobs, self.num_prompt_tokens = self._ints
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
        self.seeds[row] = np.uint64(new.seed & 0xFFFF_FFFF_FFFF_FFFF).astype(np.int64)  # philox takes the 64 bits
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.num_prompt_tokens[row] = new.num_prompt_tokens
        self.min_tokens[row] = params.min_tokens
        self._bias.pop(row, None)
        self._stop_token_ids.pop(row, None)
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias.keys(), np.int64)
            self._bias[row] = (ids, np.fromiter(params.logit_bias.values(), np.float64))
        stop_ids = [token_id for token_id in new.stop_token_ids if 0 <= token_id < self.vocab_size]
        if params.min_tokens and stop_ids and params.guidance is None:  # else the mask holds them back
            self._stop_token_ids[row] = np.unique(np.array(stop_ids, np.int64))

    def metadata(self, rows: Ints, positions: Ints, token_table: npt.NDArray[np.int32]) -> SamplingMetadata:
        """The settings of `rows` [num_rows], whose next tokens go to `positions` [num_rows] of `token_table`."""
        # take, not indexing: each setting must be contiguous.
        return SamplingMetadata(
            floats=self._floats.take(rows, axis=1),
            ints=self._ints.take(rows, axis=1),
            positions=positions,
            bias=self._bias_of(rows, positions),
            history=self._history_of(rows, positions, token_table),
        )

    def _bias_of(self, rows: Ints, positions: Ints) -> RowValues | None:
        if not self._bias and not self._stop_token_ids:
            return None
        is_held_back = positions - self.num_prompt_tokens[rows] < self.min_tokens[rows]
        counts, ids, values = np.zeros(len(rows), np.int64), [], []
        for i, row in enumerate(rows.tolist()):
            found = [self._bias[row]] if row in self._bias else []
            if is_held_back[i] and row in self._stop_token_ids:
                stop_ids = self._stop_token_ids[row]
                found.append((stop_ids, np.full(len(stop_ids), -np.inf)))
            for token_ids, biases in found:
                counts[i] += len(token_ids)
                ids.append(token_ids)
                values.append(biases)
        if not ids:
            return None
        return RowValues(
            _offsets(counts), np.concatenate(ids).astype(np.int32), np.concatenate(values).astype(np.float32)
        )

    def _history_of(self, rows: Ints, positions: Ints, token_table: Int32s) -> RowTokens | None:
        penalties = self._floats[3:, rows]
        with_penalty = (penalties != [[1.0], [0.0], [0.0]]).any(axis=0)
        if not with_penalty.any():
            return None
        lengths = np.where(with_penalty, positions, 0)
        index = np.repeat(np.arange(len(rows)), lengths)
        columns = np.arange(len(index)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return RowTokens(_offsets(lengths), token_table[rows[index], columns])


def _offsets(counts: Ints) -> Int32s:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
