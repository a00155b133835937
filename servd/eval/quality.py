"""How well a model answers under given settings: perplexity of a text, and short questions; and against float32.

Owns the measure and the verdict "faithful". Knows nothing of tokenizers, of servers, nor of how results are shown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from servd.attention.kv_dtype import KVCacheDtype
from servd.config import CacheConfig, EngineConfig
from servd.eval.paged_text import PagedTexts, hidden_states, judged_rows
from servd.eval.questions import MAX_ANSWER_TOKENS, SIGNIFICANCE, chance_of_difference, score
from servd.hub.files import ModelFiles
from servd.models.base import Model
from servd.models.loader import Progress
from servd.worker.device import load_on_device

QUESTIONS_AT_ONCE = 16  # a step's worth of short prompts
BLOCK_TOKENS = 64  # neighbouring tokens' losses hang together: the error is judged from blocks of them
FAITHFUL_PERPLEXITY = 0.01  # largest relative change of perplexity


@dataclass(frozen=True, slots=True)
class Exam:
    """What a model is measured by: a text to read and questions to answer."""

    token_ids: Sequence[int]  # of the text
    context: int  # tokens that see each other; the first of a context is not judged
    prompts: Sequence[Sequence[int]]  # token ids of each of `questions()`, as the model reads questions
    decode: Callable[[Sequence[int]], str]  # token ids of an answer to text
    eos_token_ids: frozenset[int] = frozenset()


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
    model = dataclasses.replace(config.model, dtype="float32", quantization="none", deterministic=True)
    return dataclasses.replace(config, model=model, cache=CacheConfig(block_size=config.cache.block_size))


def evaluate(config: EngineConfig, files: ModelFiles, exam: Exam, progress: Progress | None = None) -> Quality:
    """Load the model as a server would, and measure it. Raises ConfigError for a wrong flag or file."""
    model = load_on_device(config, files, progress)
    return evaluate_model(model, KVCacheDtype.from_config(config.cache), exam, progress)


def evaluate_model(model: Model, kv_dtype: KVCacheDtype, exam: Exam, progress: Progress | None = None) -> Quality:
    """The same for a loaded model."""
    report = progress or (lambda what, done, total: None)
    report("reading the text", 0, 1)
    losses = _losses(model, kv_dtype, exam.token_ids, min(exam.context, model.max_position_embeddings))
    report("reading the text", 1, 1)
    answers: list[str] = []
    total = len(exam.prompts)
    for begin in range(0, total, QUESTIONS_AT_ONCE):
        report("answering questions", begin, total)
        part = exam.prompts[begin : begin + QUESTIONS_AT_ONCE]
        texts = PagedTexts(model, kv_dtype, len(part), max(map(len, part)) + MAX_ANSWER_TOKENS)
        for tokens in texts.continue_greedily(part, MAX_ANSWER_TOKENS):
            end = next((i for i, token in enumerate(tokens) if token in exam.eos_token_ids), len(tokens))
            answers.append(exam.decode(tokens[:end]))
    report("answering questions", total, total)
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
def _losses(model: Model, kv_dtype: KVCacheDtype, token_ids: Sequence[int], context: int) -> Tensor:
    """Loss of every judged token, in order of the text: [num_judged] float64, nats."""
    hidden = hidden_states(model, kv_dtype, token_ids, context)
    parts = []
    for rows, targets in judged_rows(token_ids, context, hidden.device):
        logprobs = model.compute_logits(hidden[rows]).double().log_softmax(-1)
        parts.append(-logprobs.gather(1, targets[:, None]).flatten())
    return torch.cat(parts).cpu()
