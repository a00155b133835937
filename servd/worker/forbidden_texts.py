"""Which tokens would complete a forbidden text, given the last bytes of an answer.

Owns the bytes of a vocabulary, sorted for look-ups. Knows nothing of requests; masks are int32 words of 32 tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLTokenizer

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def mask_of(token_ids: Iterable[int] | Int64s, num_words: int) -> Int32s:
    """[num_words] with the bits of `token_ids` set; ids beyond the words are left out."""
    bits = np.zeros(num_words * 32, np.uint8)
    ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids), np.int64)
    bits[ids[ids < len(bits)]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class TokenBytes:
    """What each token adds to a text; special tokens add nothing."""

    def __init__(self, vocabulary: LLTokenizer) -> None:
        size = vocabulary.vocab_size
        self.num_words = -(-size // 32)
        self.tokens = [
            b"" if vocabulary.is_special_token(i) else vocabulary.decode_bytes([i]) for i in range(size)
        ]  # [vocab_size]
        self._order = np.array(sorted(range(size), key=self.tokens.__getitem__), np.int64)
        self._sorted = [self.tokens[i] for i in self._order]
        self._ends = np.cumsum([len(data) for data in self.tokens])
        self._all = np.frombuffer(b"".join(self.tokens), np.uint8)

    def with_prefix(self, prefix: bytes) -> Int64s:
        """Ids of the tokens that begin with `prefix`, which is not empty."""
        first = bisect_left(self._sorted, prefix)
        beyond = prefix.rstrip(b"\xff")  # the next bytes after all that begin so: the last one that can be counted up
        after = beyond[:-1] + bytes([beyond[-1] + 1]) if beyond else None
        last = len(self._sorted) if after is None else bisect_left(self._sorted, after)
        return self._order[first:last]

    def containing(self, text: bytes) -> Int64s:
        """Ids of the tokens that hold `text`, which is not empty."""
        starts = np.arange(len(self._all) - len(text) + 1)
        for offset, byte in enumerate(text):
            starts = starts[self._all[starts + offset] == byte]
        owners = np.searchsorted(self._ends, starts, side="right")
        return np.unique(owners[starts + len(text) <= self._ends[owners]])


class ForbiddenTexts:
    """Keeps an answer free of some texts, whatever tokens they would be written with."""

    def __init__(self, texts: Sequence[str], tokens: TokenBytes) -> None:
        self._tokens = tokens
        self.tail = b""  # of the answer so far, as long as a begun text can be; set it to go back
        words = [text.encode() for text in texts]
        self._max_tail = max(map(len, words)) - 1
        self._always = np.zeros(tokens.num_words, np.int32)
        self._begun: dict[int, list[tuple[bytes, Int64s]]] = {}  # by last byte: a beginning, and what completes it
        for word in words:
            self._always |= mask_of(tokens.containing(word), tokens.num_words)
            for length in range(1, len(word)):
                ids = tokens.with_prefix(word[length:])
                if len(ids):
                    self._begun.setdefault(word[length - 1], []).append((word[:length], ids))

    def consume(self, token_ids: Sequence[int]) -> None:
        """The answer goes on with these tokens."""
        data = self.tail + b"".join([self._tokens.tokens[i] for i in token_ids])
        self.tail = data[max(len(data) - self._max_tail, 0) :]

    def forbid(self, mask: Int32s) -> None:
        """Clear the bits of `mask` [num_words] whose tokens would complete a text now."""
        mask &= ~self._always
        if self.tail:
            for beginning, ids in self._begun.get(self.tail[-1], []):
                if self.tail.endswith(beginning):
                    mask &= ~mask_of(ids, len(mask))
