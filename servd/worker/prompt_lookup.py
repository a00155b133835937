"""What comes next in a sequence that repeats itself: its own earlier words (Saxena 2023, "Prompt Lookup Decoding").

One object a request. Knows nothing of batches or of what a guess costs.
"""

from __future__ import annotations

LONGEST = 3  # tokens at the end that are looked up; else the last 2
_BITS = 21  # of a token id in an n-gram's key


class PromptLookup:
    """The tokens of a request, and where in them the last few stood before.

    The guess is the token behind the most recent earlier occurrence of the last three tokens, or else of the last two;
    a copy that has been right so far is followed on, since the longer a match, the surer it is.
    """

    __slots__ = ("_behind_pair", "_behind_triple", "_num_indexed", "num_matched", "source", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.source: int | None = None  # position of the token that is guessed to come next
        self.num_matched = 0  # tokens before `source` that equal those at the end, as far as it was followed
        self._behind_pair: dict[int, int] = {}  # last two tokens → position behind them
        self._behind_triple: dict[int, int] = {}
        self._num_indexed = 0  # positions that these tables lead to

    def extend(self, token_ids: list[int]) -> int:
        """Take in tokens that came next; returns how many of them were guessed."""
        num_right = 0
        for token_id in token_ids:
            if self.source is not None and self.tokens[self.source] == token_id:
                num_right += 1
                self.source += 1
                self.num_matched += 1
            else:
                self.source = None
            self.tokens.append(token_id)
        self._index()
        if self.source is None:
            self._find()
        return num_right

    def guess(self, count: int) -> list[int]:
        """The next `count` tokens; none without a guess. A copy that reaches the end repeats itself."""
        if self.source is None:
            return []
        guessed = self.tokens[self.source : self.source + count]
        for i in range(count - len(guessed)):
            guessed.append(guessed[i])
        return guessed

    def _index(self) -> None:
        """File the pairs and triples that have a token behind them; of equal ones the later is found."""
        tokens, begin = self.tokens, max(self._num_indexed, 2)
        for position in range(begin, len(tokens)):
            pair = tokens[position - 2] << _BITS | tokens[position - 1]
            self._behind_pair[pair] = position
            if position >= LONGEST:
                self._behind_triple[tokens[position - 3] << 2 * _BITS | pair] = position
        self._num_indexed = len(tokens)

    def _find(self) -> None:
        tokens = self.tokens
        if len(tokens) < LONGEST:
            return
        pair = tokens[-2] << _BITS | tokens[-1]
        self.num_matched = LONGEST
        self.source = self._behind_triple.get(tokens[-3] << 2 * _BITS | pair)
        if self.source is None:
            self.num_matched = LONGEST - 1
            self.source = self._behind_pair.get(pair)
