"""Token ids to text as they arrive, never half a character; and stop strings, no part of which leaks out.

Knows nothing of requests. A token's bytes are fixed, so each token costs one table look-up, whatever came before.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What a detokenizer needs of a tokenizer."""

    special_token_ids: frozenset[int]
    num_stripped_spaces: int

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text."""


class Detokenizer:
    """Incremental decode(): all push() results and the flush() joined equal `tokenizer.decode` of all ids."""

    def __init__(
        self,
        tokenizer: TokenBytes,
        skip_special_tokens: bool = True,
        *,
        continues_text: bool = False,
        shown_special_token_ids: Collection[int] = (),
    ) -> None:
        """`continues_text`: the tokens go on from other text, so a SentencePiece word keeps the space before it.

        `shown_special_token_ids`: not skipped all the same.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        if shown_special_token_ids:
            self._skipped -= frozenset(shown_special_token_ids)
        self._spaces_to_strip = 0 if continues_text else tokenizer.num_stripped_spaces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """New text that is final. Bytes of a character that is not complete yet wait for the next call."""
        token_bytes, skipped = self._tokenizer.token_bytes, self._skipped
        data = b"".join([token_bytes(i) for i in token_ids if i not in skipped])
        while self._spaces_to_strip and data:
            if not data.startswith(b" "):
                self._spaces_to_strip = 0
                break
            data = data[1:]
            self._spaces_to_strip -= 1
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else ""."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Finds the first stop string in a stream of text.

    The first is the one whose last character comes first: generation ends as soon as any stop string is complete. Of
    several that end there the longest counts. The result does not depend on how the text was cut into pushes.
    """

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        """`include`: the stop string itself is part of the text that is sent. Every stop has a character at least."""
        assert all(stops), f"an empty stop string would stop at once: {stops!r}"
        self._stops = stops
        self._include = include
        self._held = ""
        self._matched = False

    def push(self, text: str) -> tuple[str, str | None]:
        """(text safe to send, the stop string that matched or None). After a match all further text is dropped."""
        if self._matched:
            return "", None
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._matched, self._held = True, ""
            end, start, stop = min(found)
            return text[: end if self._include else start], stop
        keep = max(_begun(text, stop) for stop in self._stops)
        safe, self._held = (text[:-keep], text[-keep:]) if keep else (text, "")
        return safe, None

    def flush(self) -> str:
        """Text held back that turned out to begin no stop string."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
