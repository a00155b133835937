"""What a KV storage type costs and gains: perplexity, divergence, equal greedy tokens, against the full cache.

Knows nothing of how a type stores numbers, nor of how results are shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from servd.attention.kv_dtype import KVCacheDtype
from servd.config import CacheConfig, EngineConfig, default_cpu_kv_memory
from servd.eval.paged_text import PagedTexts, hidden_states, judged_rows
from servd.hub.files import ModelFiles
from servd.models.base import Model
from servd.models.loader import Progress
from servd.worker.device import load_on_device

NUM_PROMPTS = 4
PROMPT_LEN = 64
GREEDY_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One storage type against the full cache, on the same text."""

    kv_cache_dtype: str
    bytes_per_token: float  # over all layers, scales counted
    capacity: float  # tokens that fit, relative to the full cache
    requests_that_fit: int  # of the longest length, in the memory asked about
    perplexity: float
    perplexity_change: float  # relative to the full cache
    kl_divergence: float  # nats a token, KL(full || this) of the next-token distribution
    top1_equal: float  # share of positions of the text whose likeliest token is the same
    greedy_equal: float  # share of equal tokens in greedy answers of GREEDY_TOKENS


def probe_model(
    config: EngineConfig,
    files: ModelFiles,
    token_ids: Sequence[int],
    caches: Mapping[str, CacheConfig],
    *,
    context: int,
    progress: Progress | None = None,
) -> list[ProbeResult]:
    """Load the model and probe it; `caches`: what to compare, by name. Raises ConfigError."""
    model = load_on_device(config, files, progress)
    return probe(
        model,
        token_ids,
        {name: KVCacheDtype.from_config(cache) for name, cache in caches.items()},
        context=min(context, model.max_position_embeddings),
        kv_memory=config.cache.kv_cache_memory or default_cpu_kv_memory(),
        max_model_len=config.model.max_model_len or model.max_position_embeddings,
        progress=progress,
    )


def probe(
    model: Model,
    token_ids: Sequence[int],
    choices: Mapping[str, KVCacheDtype],
    *,
    context: int,
    kv_memory: int,
    max_model_len: int,
    progress: Progress | None = None,
) -> list[ProbeResult]:
    """Compare every choice with the cache in the compute dtype, which comes first in the results, as "auto".

    `token_ids`: the text; it is cut into contexts of `context` tokens, of which the first token is not judged.
    """
    report = progress or (lambda what, done, total: None)
    block_size = next(iter(choices.values())).block_size if choices else 16
    full_dtype = KVCacheDtype(block_size=block_size)
    steps = 1 + len(choices)
    report("comparing KV types", 0, steps)
    full_hidden = hidden_states(model, full_dtype, token_ids, context)
    prompts = _prompts(token_ids)
    results: list[ProbeResult] = []
    full_answers: list[list[int]] = []
    full_bytes = 0.0
    for done, (name, kv_dtype) in enumerate([("auto", full_dtype), *choices.items()]):
        hidden = full_hidden if done == 0 else hidden_states(model, kv_dtype, token_ids, context)
        loss, kl, top1 = _compare(model, full_hidden, hidden, token_ids, context)
        texts = PagedTexts(model, kv_dtype, len(prompts), PROMPT_LEN + GREEDY_TOKENS)
        answers = texts.continue_greedily(prompts, GREEDY_TOKENS)
        bytes_per_token = sum(kv_format.block_bytes for kv_format in texts.formats) / block_size
        full_answers, full_bytes = full_answers or answers, full_bytes or bytes_per_token
        perplexity = math.exp(loss)
        blocks = -(-max_model_len // block_size)
        results.append(
            ProbeResult(
                kv_cache_dtype=name,
                bytes_per_token=bytes_per_token,
                capacity=full_bytes / bytes_per_token,
                requests_that_fit=int(kv_memory // (blocks * block_size * bytes_per_token)),
                perplexity=perplexity,
                perplexity_change=perplexity / results[0].perplexity - 1 if results else 0.0,
                kl_divergence=kl,
                top1_equal=top1,
                greedy_equal=_share_equal(full_answers, answers),
            )
        )
        report("comparing KV types", done + 1, steps)
    return results


def _prompts(token_ids: Sequence[int]) -> list[list[int]]:
    """Beginnings spread over the text."""
    stride = max(1, (len(token_ids) - PROMPT_LEN) // NUM_PROMPTS)
    return [list(token_ids[i * stride : i * stride + PROMPT_LEN]) for i in range(NUM_PROMPTS)]


def _share_equal(full: list[list[int]], other: list[list[int]]) -> float:
    pairs = [a == b for first, second in zip(full, other, strict=True) for a, b in zip(first, second, strict=True)]
    return sum(pairs) / len(pairs)


@torch.inference_mode()
def _compare(
    model: Model, full: Tensor, other: Tensor, token_ids: Sequence[int], context: int
) -> tuple[float, float, float]:
    """Mean loss of `other`, mean KL(full || other) and share of equal likeliest tokens, over judged positions."""
    count = 0
    loss = kl = top1 = 0.0
    for rows, targets in judged_rows(token_ids, context, full.device):
        full_logprobs = model.compute_logits(full[rows]).double().log_softmax(-1)
        logprobs = model.compute_logits(other[rows]).double().log_softmax(-1)
        loss -= float(logprobs.gather(1, targets[:, None]).sum())
        kl += float((full_logprobs.exp() * (full_logprobs - logprobs)).sum())
        top1 += float((full_logprobs.argmax(-1) == logprobs.argmax(-1)).sum())
        count += len(rows)
    return loss / count, kl / count, top1 / count
