"""Log-probabilities of tokens and of their best alternatives, from raw logits.

Knows nothing of sampling: these are the model's own, before bias, penalties and temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from servd.outputs import TokenLogprobs
from servd.worker.ranking import best_token_ids
from servd.worker.row_slices import row_slices


def gather_logprobs(logits: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """Logprob, rank and the best `num_top[i]` alternatives of `token_ids` [num_rows] under `logits`
    [num_rows, vocab_size] float32. Rank is one more than the number of tokens that are strictly likelier.
    """
    result: list[TokenLogprobs] = []
    for part in row_slices(logits):
        result += _gather(logits[part], token_ids[part], num_top[part])
    return result


def _gather(logits: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = ((logprobs > chosen).sum(dim=-1) + 1).tolist()
    top_ids = best_token_ids(logits, min(max(num_top, default=0), logits.shape[1]))
    top_logprobs = logprobs.gather(1, top_ids).tolist()
    rows = zip(token_ids.tolist(), chosen[:, 0].tolist(), ranks, top_ids.tolist(), top_logprobs, num_top, strict=True)
    return [
        TokenLogprobs(token_id=token, logprob=value, rank=rank, top_token_ids=ids[:n], top_logprobs=values[:n])
        for token, value, rank, ids, values, n in rows
    ]
