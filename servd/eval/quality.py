"""How well a model answers under given settings: perplexity of a text, and short questions; and against float32.

Owns the measure and the verdict "faithful". Knows nothing of tokenizers, of servers, nor of how results are shown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from servd.attention.kv_dtype import KVCacheDtype
from servd.config import CacheConfig, EngineConfig
from servd.eval.paged_text import PagedTexts, hidden_states
from servd.eval.questions import MAX_ANSWER_TOKENS, SIGNIFICANCE, chance_of_difference, score
from servd.hub.files import ModelFiles
from servd.models.base import Model
from servd.worker.device import load_on_device

LOGIT_ROWS = 128  # rows of logits held at a time: [rows, vocab_size] in float64
QUESTIONS_AT_ONCE = 16  # a step's worth of short prompts
BLOCK_TOKENS = 64  # neighbouring tokens' losses hang together: the error is judged from blocks of them
FAITHFUL_PERPLEXITY = 0.01  # largest relative change of perplexity

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Quality:
    """What one way of computing gave."""

    perplexity: float
    block_losses: list[float]  # nats a token, of each block of BLOCK_TOKENS judged tokens; the last may be shorter
    answers: list[str]
    right: list[bool]  # one an answer

    @property
    def num_right(self) -> int:
        """Questions that were answered right."""
        return sum(self.right)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A way of computing against the reference, on the same text and questions."""

    perplexity_change: float  # relative
    perplexity_error: float  # half of its 95 % interval
    equal_answers: int  # word for word
    only_reference_right: int
    only_this_right: int
    chance: float  # that equally good answerers differ as much (McNemar)

    @property
    def within_noise(self) -> bool:
        """Whether the right answers differ by no more than chance explains."""
        return self.chance >= SIGNIFICANCE

    @property
    def is_faithful(self) -> bool:
        """Perplexity within 1 %, and right answers within noise."""
        return abs(self.perplexity_change) <= FAITHFUL_PERPLEXITY and self.within_noise


def reference_config(config: EngineConfig) -> EngineConfig:
    """The same checkpoint in float32 with nothing quantized, on the same device."""
    fields = {field.name for field in dataclasses.fields(config.model)}
    exact: dict[str, Any] = {"dtype": "float32", "quantization": "none", "deterministic": True}
    model = dataclasses.replace(config.model, **{name: value for name, value in exact.items() if name in fields})
    return dataclasses.replace(config, model=model, cache=CacheConfig(block_size=config.cache.block_size))


def evaluate(
    config: EngineConfig,
    files: ModelFiles,
    token_ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    *,
    context: int,
    eos_token_ids: frozenset[int] = frozenset(),
    progress: Progress | None = None,
) -> Quality:
    """Load the model as a server would, and measure it.

    `prompts`: token ids of each of `questions()`, as the model reads questions; `decode`: token ids to text.
    Raises ConfigError for a wrong flag or file.
    """
    model = load_on_device(config, files, progress)
    return evaluate_model(
        model, KVCacheDtype.from_config(config.cache), token_ids, prompts, decode, context=context,
        eos_token_ids=eos_token_ids, progress=progress,
    )  # fmt: skip


def evaluate_model(
    model: Model,
    kv_dtype: KVCacheDtype,
    token_ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    *,
    context: int,
    eos_token_ids: frozenset[int] = frozenset(),
    progress: Progress | None = None,
) -> Quality:
    """The same for a loaded model. Contexts of `context` tokens do not see each other; their first is not judged."""
    report = progress or (lambda what, done, total: None)
    report("reading the text", 0, 1)
    context = min(context, model.max_position_embeddings)
    losses = _losses(model, hidden_states(model, kv_dtype, token_ids, context), token_ids, context)
    report("reading the text", 1, 1)
    answers: list[str] = []
    for begin in range(0, len(prompts), QUESTIONS_AT_ONCE):
        report("answering questions", begin, len(prompts))
        part = prompts[begin : begin + QUESTIONS_AT_ONCE]
        texts = PagedTexts(model, kv_dtype, len(part), max(map(len, part)) + MAX_ANSWER_TOKENS)
        for tokens in texts.continue_greedily(part, MAX_ANSWER_TOKENS):
            end = next((i for i, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
            answers.append(decode(tokens[:end]))
    report("answering questions", len(prompts), len(prompts))
    return Quality(
        perplexity=math.exp(float(losses.mean())),
        block_losses=[float(block.mean()) for block in torch.split(losses, BLOCK_TOKENS)],
        answers=answers,
        right=score(answers),
    )


def compare(quality: Quality, reference: Quality) -> Comparison:
    """`quality` against `reference`; both on the same text and questions."""
    differences = torch.tensor(quality.block_losses) - torch.tensor(reference.block_losses)
    error = float(differences.std() / math.sqrt(len(differences))) if len(differences) > 1 else math.inf
    ratio = quality.perplexity / reference.perplexity
    right = list(zip(reference.right, quality.right, strict=True))
    return Comparison(
        perplexity_change=ratio - 1,
        perplexity_error=1.96 * error * ratio,  # of a logarithm's difference: relative
        equal_answers=sum(a == b for a, b in zip(reference.answers, quality.answers, strict=True)),
        only_reference_right=sum(theirs and not ours for theirs, ours in right),
        only_this_right=sum(ours and not theirs for theirs, ours in right),
        chance=chance_of_difference(reference.right, quality.right),
    )


@torch.inference_mode()
def _losses(model: Model, hidden: Tensor, token_ids: Sequence[int], context: int) -> Tensor:
    """Loss of every judged token, in order of the text: [num_judged] float64, nats."""
    targets = torch.tensor([*token_ids[1:], 0], device=hidden.device)
    judged = torch.tensor([(i + 1) % context != 0 and i + 1 < len(token_ids) for i in range(len(token_ids))])
    parts = []
    for rows in torch.split(judged.nonzero().flatten().to(hidden.device), LOGIT_ROWS):
        logprobs = model.compute_logits(hidden[rows]).double().log_softmax(-1)
        parts.append(-logprobs.gather(1, targets[rows, None]).flatten())
    return torch.cat(parts).cpu()
