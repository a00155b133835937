"""Changes to logits before the draw: logit_bias, min_tokens, repetition, frequency and presence penalties.

Knows nothing of temperature or probabilities. Each function changes `logits` [num_rows, vocab_size] float32 in place,
and each row by that row's settings alone: single roundings only, so neither the batch nor SIMD tails show in a bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from servd.worker.sampling_metadata import SamplingMetadata, SparseValues, TokenHistory


def apply_logits_processors(logits: Tensor, metadata: SamplingMetadata) -> None:
    """Apply all that the rows ask for, in vLLM's order: bias, min_tokens, penalties."""
    if metadata.logit_bias is not None:
        add_values(logits, metadata.logit_bias)
    if metadata.forbidden is not None:
        add_values(logits, metadata.forbidden)
    if metadata.history is not None:
        apply_penalties(logits, metadata.history)


def add_values(logits: Tensor, sparse: SparseValues) -> None:
    """Add `sparse` to the logits; -inf forbids a token. No (row, token) may occur twice."""
    where = (to_device(sparse.rows, logits), to_device(sparse.token_ids, logits))
    logits[where] += to_device(sparse.values, logits).to(logits.dtype)


def apply_penalties(logits: Tensor, history: TokenHistory) -> None:
    """Repetition over prompt and output (vLLM's rule: divide above zero, multiply below), the others over output."""
    vocab_size = logits.shape[1]
    places = history.index * vocab_size + history.token_ids
    seen = np.unique(places)
    in_output, counts = np.unique(places[history.is_output], return_counts=True)
    num_output = np.zeros(len(seen))
    num_output[np.searchsorted(seen, in_output)] = counts
    index = seen // vocab_size

    def per_place(values: npt.NDArray[np.float64]) -> Tensor:
        return to_device(values, logits).to(logits.dtype)

    where = (to_device(history.rows[index], logits), to_device(seen % vocab_size, logits))
    penalized = logits[where]
    repetition = per_place(history.repetition[index])
    penalized = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
    penalized -= per_place(num_output * history.frequency[index])
    penalized -= per_place((num_output > 0) * history.presence[index])
    logits[where] = penalized


def to_device(values: npt.NDArray[np.generic], like: Tensor) -> Tensor:
    """A tensor of the array's own dtype on the device of `like`."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device)
