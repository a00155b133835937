"""What prompts are cut from: a row of token ids, or of words where no tokenizer is at hand.

Knows nothing of lengths or servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from servd.benchmark.requests import Prompt

CHARS_A_TOKEN = 4.0  # of English, in the common tokenizers: used where none can be asked


@dataclass(frozen=True, slots=True)
class Corpus:
    """A circle of token ids or words; any stretch of it is a prompt."""

    pieces: tuple[int, ...] | tuple[str, ...]
    tokens_a_piece: float = 1.0

    @classmethod
    def of_ids(cls, token_ids: Sequence[int]) -> Corpus:
        """Prompts will be token ids, of exact lengths."""
        return cls(tuple(token_ids))

    @classmethod
    def of_text(cls, text: str, num_tokens: int | None = None) -> Corpus:
        """Prompts will be text; their lengths in tokens are right on average, if `num_tokens` of the text is known."""
        words = tuple(text.split())
        return cls(words, (num_tokens or len(" ".join(words)) / CHARS_A_TOKEN) / len(words))

    def stretch(self, start: int, num_tokens: int) -> tuple[int, ...] | tuple[str, ...]:
        """About `num_tokens` tokens' worth of pieces from place `start` on, around the circle if need be."""
        count = max(round(num_tokens / self.tokens_a_piece), 1) if num_tokens > 0 else 0
        start %= len(self.pieces)
        found = self.pieces[start : start + count]
        while len(found) < count:
            found = found + self.pieces[: count - len(found)]  # type: ignore[operator]
        return found


def join(*stretches: tuple[int, ...] | tuple[str, ...]) -> Prompt:
    """One prompt of several stretches, all ids or all words."""
    pieces = [piece for stretch in stretches for piece in stretch]
    if pieces and isinstance(pieces[0], str):
        return " ".join(str(piece) for piece in pieces)
    return tuple(int(piece) for piece in pieces)
