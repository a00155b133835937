"""Owns the measured cases of sample; torch sorts the vocabulary, as engines without such a kernel do.
Does not know how they are timed."""

from collections.abc import Callable
from typing import Any

import torch

from servd_kernels.bench import Case
from servd_kernels.sample import OP, SampleParams, reference

_VOCAB = 49_152
_PENALTIES = (1.2, 0.5, 0.5)  # repetition, presence, frequency
_OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "greedy, penalties": {"temperature": 0.0, "penalties": _PENALTIES, "num_tokens": 1024},
    "greedy, 5 logprobs": {"temperature": 0.0, "num_logprobs": 5},
}


def _torch_sample(logits: torch.Tensor, params: SampleParams) -> object:
    """Whole-batch torch operations on float32; all rows have the same settings here."""
    if params.history is not None:
        tokens = params.history.token_ids.view(len(logits), -1).long()
        output = tokens[:, int(params.history.num_prompt_tokens[0]) :]
        counts = torch.zeros_like(logits).scatter_add_(1, output, torch.ones_like(output, dtype=torch.float32))
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, tokens, True)
        penalized = torch.where(logits > 0, logits / _PENALTIES[0], logits * _PENALTIES[0])
        logits = torch.where(seen, penalized, logits) - _PENALTIES[1] * (counts > 0) - _PENALTIES[2] * counts
    if params.max_logprobs >= 0:
        return torch.log_softmax(logits, -1).topk(params.max_logprobs)
    if not params.temperature[0]:
        return logits.argmax(-1)
    top_k, top_p = int(params.top_k[0]), float(params.top_p[0])
    ids = None
    if top_k or top_p < 1:
        logits, ids = logits.topk(top_k) if top_k else logits.sort(descending=True)
    probabilities = torch.softmax(logits / float(params.temperature[0]), -1)
    if top_p < 1:
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    drawn = torch.multinomial(probabilities, 1)
    return drawn if ids is None else ids.gather(1, drawn)


def _case(rows: int, name: str) -> Case:
    run = OP.bind("cpu")

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        inputs = reference.make_inputs(rows, _VOCAB, seed=seed, **_OPTIONS[name])
        logits, params = inputs["logits"], inputs["params"]
        return lambda: run(logits, params), lambda: _torch_sample(logits, params)

    return Case(f"{rows}x{_VOCAB} {name}", make, 4 * rows * _VOCAB)


CASES = [_case(rows, name) for name in _OPTIONS for rows in (1, 32)]
