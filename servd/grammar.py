"""Grammars compiled by llguidance under limits that are the same wherever it is done: in the front's check, in workers.

Owns the limits and the library's vocabulary of a tokenizer. Knows nothing of requests; importing it imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_GRAMMAR_CHARS = 256 << 10  # of the text
MAX_ITEMS_IN_ROW = 600  # taking in one token holds the GIL for their square: 8 ms at 600, 200 ms at the library's 2,000
MAX_CHOICES = 128  # properties of one object that may be left out: each takes 4 items of a row
# Fuel is the library's unit of work, near 14,000 a millisecond in a step; a lexer state takes 1 to 2 KB.
LIMITS = LLParserLimits(
    max_items_in_row=MAX_ITEMS_IN_ROW,
    initial_lexer_fuel=300_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """The library's own words on what is wrong with a grammar."""


def load_vocabulary(path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokens of a tokenizer.json, for a model of `vocab_size` rows. 0.2 s and 50 MB at 49,152 tokens.

    Raises GrammarError if the library cannot read it.
    """
    try:
        return LLTokenizer(str(path), n_vocab=vocab_size, eos_token=sorted(eos_token_ids) or None)
    except ValueError as error:
        raise GrammarError(f"grammars cannot be used with this tokenizer: {error}") from None


def compile_grammar(text: str, vocabulary: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of an answer, for one answer alone. Releases the GIL. Raises GrammarError."""
    matcher = LLMatcher(vocabulary, text, log_level=0, limits=LIMITS)
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """Raise GrammarError if the matcher has met an error or a limit: it never leaves that state."""
    if matcher.is_error():
        raise GrammarError(reason_of(matcher.get_error()))


def reason_of(error: str) -> str:
    """The library's message in one line, without the marks it leaves for its own authors."""
    text = " ".join(error.removesuffix("<non-verbose/>").split())
    if text.startswith("NoExtension"):
        return "it matches no text at all"
    return text[:500]


def fill_mask(matcher: LLMatcher, mask: Any) -> None:
    """Set bit t % 32 of word t // 32 of `mask`, contiguous int32 [ceil(vocab_size / 32)], if token t may follow.

    Releases the GIL. Raises GrammarError at a limit. A complete grammar allows end-of-text alone.
    """
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    check(matcher)
