"""From logits to tokens: argmax, or a draw that depends on (seed, position) and this row's logits alone.

Owns temperature, top-k, top-p, min-p (in this order) and the draw. Knows nothing of requests or of the batch's past.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from servd.outputs import TokenLogprobs
from servd.worker.logits_processors import apply_logits_processors, to_device
from servd.worker.logprobs import gather_logprobs
from servd.worker.philox import uniform
from servd.worker.ranking import argmax, kept_token_ids
from servd.worker.row_slices import row_slices
from servd.worker.sampling_metadata import SamplingMetadata


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One step's tokens; row i of the logits is entry i."""

    token_ids: npt.NDArray[np.int64]  # [num_rows] undefined where the row failed
    logprobs: list[TokenLogprobs | None]  # [num_rows]
    failed: dict[int, str]  # row → why it has no token


class Sampler:
    """Samples one token for each row.

    Every operation works along rows in a fixed order (softmax and cumsum kernels go row by row; all else is exact or
    rounds once), so a row's token is the same, bit for bit, alone and in any batch. Sums over a row with torch.sum are
    not: with one row in the batch they are split between threads.
    """

    def __call__(self, logits: Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Sample from `logits` [num_rows, vocab_size] float32, which is left as it is."""
        best, token_ids = argmax(logits)  # NaN wins, and so shows itself
        failed = _failures(best)
        none: list[TokenLogprobs | None] = [None] * len(logits)
        if metadata.is_plain_greedy:
            return SamplerOutput(token_ids.cpu().numpy(), none, failed)
        processed = logits
        if metadata.logit_bias is not None or metadata.forbidden is not None or metadata.history is not None:
            processed = logits.clone()
            apply_logits_processors(processed, metadata)
            best, token_ids = argmax(processed)
            failed = _failures(best) | failed
        random = np.flatnonzero((metadata.temperature > 0) & _ok(len(logits), failed))
        if len(random):
            token_ids[to_device(random, logits)] = draw(processed[to_device(random, logits)], metadata, random)
        return SamplerOutput(token_ids.cpu().numpy(), _logprobs(logits, token_ids, metadata, failed), failed)


def draw(logits: Tensor, metadata: SamplingMetadata, rows: npt.NDArray[np.int64]) -> Tensor:
    """One token id for each of `logits` [num_rows, vocab_size]; `rows` [num_rows] are their rows in `metadata`.

    Temperature, top-k, top-p over what top-k left, min-p, then the inverse of the cumulative distribution in the order
    of token ids, at u times its total: that renormalizes what the filters left. Probabilities are float64.
    """
    u = uniform(metadata.seeds[rows], metadata.positions[rows])
    parts = [_draw(logits[part], metadata, rows[part], u[part]) for part in row_slices(logits)]
    return torch.cat(parts)


def _draw(
    logits: Tensor, metadata: SamplingMetadata, rows: npt.NDArray[np.int64], u: npt.NDArray[np.float64]
) -> Tensor:
    weights = _weights(logits, metadata, rows)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that the search cannot end behind the last token that has a weight.
    target = torch.minimum(to_device(u, logits).unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _weights(logits: Tensor, metadata: SamplingMetadata, rows: npt.NDArray[np.int64]) -> Tensor:
    """Probabilities up to a factor, zero for what the filters took away. [num_rows, vocab_size] float64"""
    temperature = to_device(metadata.temperature[rows], logits).unsqueeze(1)
    weights = torch.softmax(logits.double().div_(temperature), dim=-1)
    min_p = metadata.min_p[rows]
    least = weights.amax(dim=-1, keepdim=True) * to_device(min_p, logits).unsqueeze(1)
    vocab_size = logits.shape[1]
    top_k, top_p = metadata.top_k[rows], metadata.top_p[rows]
    top_k = np.where(top_k > 0, np.minimum(top_k, vocab_size), vocab_size)
    ranked = np.flatnonzero((top_k < vocab_size) | (top_p < 1.0))
    if len(ranked):
        on_host, logits_on_host = weights.cpu().numpy(), logits.cpu().numpy()
        for row in ranked.tolist():
            kept = kept_token_ids(logits_on_host[row], on_host[row], int(top_k[row]), float(top_p[row]))
            values = on_host[row, kept]
            on_host[row] = 0.0
            on_host[row, kept] = values
        weights = torch.from_numpy(on_host).to(logits.device)
    if min_p.any():
        weights.masked_fill_(weights < least, 0.0)
    return weights


def _failures(best: Tensor) -> dict[int, str]:
    values = best.cpu().numpy()
    if np.isfinite(values).all():
        return {}
    return {row: _failure(float(values[row])) for row in np.flatnonzero(~np.isfinite(values)).tolist()}


def _failure(best: float) -> str:
    if math.isnan(best):
        return "the model's logits hold NaN"
    return "the model's logits overflowed to infinity" if best > 0 else "no token is left to sample: all are -inf"


def _ok(num_rows: int, failed: dict[int, str]) -> npt.NDArray[np.bool_]:
    ok = np.ones(num_rows, np.bool_)
    ok[list(failed)] = False
    return ok


def _logprobs(
    logits: Tensor, token_ids: Tensor, metadata: SamplingMetadata, failed: dict[int, str]
) -> list[TokenLogprobs | None]:
    result: list[TokenLogprobs | None] = [None] * len(logits)
    rows = np.flatnonzero((metadata.num_logprobs >= 0) & _ok(len(logits), failed))
    if len(rows):
        some = to_device(rows, logits)
        found = gather_logprobs(logits[some], token_ids[some], metadata.num_logprobs[rows].tolist())
        for row, logprobs in zip(rows.tolist(), found, strict=True):
            result[row] = logprobs
    return result
