"""Fifty short questions with answers that can be checked, and when two sets of answers differ by more than chance.

Owns the questions (questions.json) and their scoring. Knows nothing of models, and imports no torch.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

MAX_ANSWER_TOKENS = 40
SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Question:
    """One question. An answer is right if it holds one of the `accept`ed texts as whole words, in any case."""

    kind: str
    prompt: str
    accept: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """Whether the answer holds what is asked for; "42" is not in "142" nor in "4.2"."""
        accepted = "|".join(map(re.escape, self.accept))
        return re.search(rf"(?<![\w.,])(?:{accepted})(?![\w]|[.,]\d)", answer, re.IGNORECASE) is not None


@functools.cache
def questions() -> tuple[Question, ...]:
    """All of them, in a fixed order."""
    entries = json.loads(resources.files(__package__).joinpath("questions.json").read_text(encoding="utf-8"))
    return tuple(Question(entry["kind"], entry["prompt"], tuple(entry["accept"])) for entry in entries)


def score(answers: Sequence[str]) -> list[bool]:
    """Which of the answers are right; one for each of `questions()`, from any engine (greedy, MAX_ANSWER_TOKENS)."""
    return [question.is_right(answer) for question, answer in zip(questions(), answers, strict=True)]


def chance_of_difference(first: Sequence[bool], second: Sequence[bool]) -> float:
    """How likely equally good answerers differ as much: McNemar's exact test, two-sided (McNemar 1947).

    Only questions that one of them got right count; of those, each is as likely to have got either half.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    total = only_first + only_second
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, tail * 0.5 ** (total - 1))
