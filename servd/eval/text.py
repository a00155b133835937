"""The text that models are judged by: a file, or real English that every Python has.

Knows nothing of models.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from servd.errors import ConfigError


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> Sequence[int]:
        """Text to token ids."""


def read_tokens(tokenizer: Encoder, path: Path | None, count: int) -> list[int]:
    """The first `count` tokens of the file, or of the Python documentation's help topics.

    Raises ConfigError for a file that cannot be read as UTF-8 or is too short.
    """
    try:
        text = python_help() if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: {error}") from None
    token_ids = list(tokenizer.encode(text[: 16 * count], add_special_tokens=False))  # no token is that long on average
    if len(token_ids) < count:
        raise ConfigError(f"--text {path} has {len(token_ids)} tokens; allowed: at least the {count} of --tokens")
    return token_ids[:count]


def python_help() -> str:
    """About 700 kB of English with some code: what help('TOPIC') shows, in the order of topics."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
