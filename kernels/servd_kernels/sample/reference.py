"""Owns the plain torch sampler that every backend is held to: one row at a time, by sorting it.
Does not know speed."""

from typing import Any

import torch

from servd_kernels.sample.params import (
    FAILED_EMPTY,
    FAILED_INFINITE,
    FAILED_NAN,
    FAILED_TOKEN_ID,
    HEADER,
    LogitBias,
    SampleParams,
    TokenHistory,
    width,
)
from servd_kernels.sample.philox import uniform


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None if dtype == torch.float32 else f"it knows torch.float32, not {dtype}"


def run(logits: torch.Tensor, params: SampleParams) -> torch.Tensor:
    packed = torch.zeros(len(logits), width(params), dtype=torch.int32, device=logits.device)
    packed[:, HEADER : (packed.shape[1] + HEADER) // 2] = -1
    u = uniform(params.seeds, params.positions)
    for row, raw in enumerate(logits):
        answer = _sample_row(raw, params, row, float(u[row]))
        packed[row, : len(answer)] = answer
        if int(packed[row, 1]) == 0 and int(params.num_logprobs[row]) >= 0:
            _report(raw, int(params.num_logprobs[row]), packed[row])
    return packed


def _sample_row(raw: torch.Tensor, params: SampleParams, row: int, u: float) -> torch.Tensor:
    """The token and the failure code of one row. [2] int32"""
    failure = _failure(raw)
    token = 0
    if not failure and params.given is not None:
        token = int(params.given[row])
        failure = 0 if 0 <= token < len(raw) else FAILED_TOKEN_ID
    elif not failure:
        edited = process(raw, params, row)
        failure = FAILED_TOKEN_ID if edited is None else _failure(edited)
        if edited is not None and not failure:
            token = _choose(edited, params, row, u)
    return torch.tensor([0 if failure else token, failure], dtype=torch.int32, device=raw.device)


def _failure(x: torch.Tensor) -> int:
    best = float(x.max())  # NaN wins
    if best != best:
        return FAILED_NAN
    return FAILED_INFINITE if best == float("inf") else FAILED_EMPTY if best == float("-inf") else 0


def process(raw: torch.Tensor, params: SampleParams, row: int) -> torch.Tensor | None:
    """The row's logits [vocab_size] after mask, bias and penalties; None for a token id out of the vocabulary."""
    x = raw.clone()
    if params.allowed is not None:
        bits = params.allowed[row].unsqueeze(1) >> torch.arange(32, dtype=torch.int32, device=raw.device)
        x[(bits & 1).flatten()[: len(x)] == 0] = float("-inf")
    for part in (params.bias, params.history):
        if part is None:
            continue
        ids = part.token_ids[part.offsets[row] : part.offsets[row + 1]].long()
        if bool(((ids < 0) | (ids >= len(x))).any()):
            return None
        if isinstance(part, LogitBias):
            x.index_add_(0, ids, part.values[part.offsets[row] : part.offsets[row + 1]])
        else:
            _penalize(x, part, row, ids)
    return x


def _penalize(x: torch.Tensor, history: TokenHistory, row: int, ids: torch.Tensor) -> None:
    seen = torch.bincount(ids, minlength=len(x)).nonzero().squeeze(1)
    counts = torch.bincount(ids[int(history.num_prompt_tokens[row]) :], minlength=len(x))[seen].float()
    penalized, repetition = x[seen], history.repetition[row]
    penalized = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
    penalized -= counts * history.frequency[row]
    penalized -= (counts > 0) * history.presence[row]
    x[seen] = penalized


def _choose(x: torch.Tensor, params: SampleParams, row: int, u: float) -> int:
    temperature, top_k, top_p = float(params.temperature[row]), int(params.top_k[row]), float(params.top_p[row])
    if temperature == 0.0:
        return int((x == x.max()).nonzero()[0])
    probabilities = torch.softmax(x.double() / temperature, dim=-1)
    kept = rank(x) if top_k > 0 or top_p < 1.0 else torch.arange(len(x), device=x.device)
    kept = kept[:top_k] if top_k > 0 else kept
    if top_p < 1.0:
        mass = probabilities[kept].cumsum(0)
        # The nucleus: every token before which the mass has not yet been reached; at least the first.
        kept = kept[: 1 + int((mass[:-1] < top_p * mass[-1]).sum())]
    weights = torch.zeros_like(probabilities)
    weights[kept] = probabilities[kept]
    weights[probabilities < float(params.min_p[row]) * probabilities.max()] = 0.0
    cumulative = weights.cumsum(0)
    total = cumulative[-1]
    # Strictly below the total, so that the search cannot end behind the last token that has a weight.
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return int(torch.searchsorted(cumulative, target, right=True))


def rank(x: torch.Tensor) -> torch.Tensor:
    """Token ids by falling logit, then by rising id. [vocab_size] int64"""
    return torch.sort(x + 0.0, descending=True, stable=True).indices  # + 0: zeros of both signs are equal


def _report(raw: torch.Tensor, num_top: int, answer: torch.Tensor) -> None:
    """Writes rank, logprob and alternatives into `answer`, a row of SampleOutput.packed that has its token."""
    logprobs = torch.log_softmax(raw.double(), dim=-1).float()
    token, middle = int(answer[0]), (len(answer) + HEADER) // 2
    answer[2] = 1 + int((raw > raw[token]).sum())
    answer[3] = logprobs[token].view(torch.int32)
    best = rank(raw)[:num_top]
    answer[HEADER : HEADER + len(best)] = best.int()
    answer[middle : middle + len(best)] = logprobs[best].view(torch.int32)


def make_inputs(
    rows: int,
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    penalties: tuple[float, float, float] | None = None,
    num_tokens: int = 0,
    num_logprobs: int = -1,
    spread: float = 3.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Normal logits times `spread`; `penalties` (repetition, presence, frequency) over `num_tokens` random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype)

    history = None
    if penalties is not None:
        history = TokenHistory(
            offsets=torch.arange(rows + 1, dtype=torch.int32) * num_tokens,
            token_ids=torch.randint(vocab_size, (rows * num_tokens,), generator=generator).int(),
            num_prompt_tokens=full(num_tokens // 2, torch.int32),
            repetition=full(penalties[0], torch.float32),
            presence=full(penalties[1], torch.float32),
            frequency=full(penalties[2], torch.float32),
        )
    params = SampleParams(
        temperature=full(temperature, torch.float64),
        top_p=full(top_p, torch.float64),
        min_p=full(min_p, torch.float64),
        top_k=full(top_k, torch.int64),
        seeds=torch.arange(rows) + 1000 * seed,
        positions=full(7, torch.int64),
        num_logprobs=full(num_logprobs, torch.int64),
        max_logprobs=num_logprobs,
        history=history,
    )
    return {"logits": torch.randn(rows, vocab_size, generator=generator) * spread, "params": params}
