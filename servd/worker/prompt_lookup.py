"""What comes next in a sequence that repeats itself: its own earlier words (Saxena 2023, "Prompt Lookup Decoding").

One object a request. Knows nothing of batches or of what a guess costs.
"""

from __future__ import annotations

import math

LONGEST = 3  # tokens at the end that are looked up; else the last 2
LEARNING_RATE = 0.5
_BITS = 21  # of a token id in an n-gram's key


class PromptLookup:
    """The tokens of a request, where in them the last few stood before, and how far that can be trusted.

    The guess is the token behind the most recent earlier occurrence of the last three tokens, or else of the last two;
    a copy that has been right so far is followed on, since the longer a match, the surer it is. After `m` equal tokens
    a guess is right with odds `odds * (m - 1)`: the shape fits greedy and sampled text alike, and `odds`, which tells
    them apart, is learned by logistic regression from every token that was foretold, whether or not it was computed
    ahead. So a request whose guesses are wrong costs nothing but the look-ups.
    """

    __slots__ = ("_behind_pair", "_behind_triple", "_num_indexed", "num_matched", "odds", "source", "tokens")

    def __init__(self, odds: float) -> None:
        """`odds`: that a guess after two equal tokens is right, to begin with."""
        self.odds = odds
        self.tokens: list[int] = []
        self.source: int | None = None  # position of the token that is guessed to come next
        self.num_matched = 0  # tokens before `source` that equal those at the end, as far as it was followed
        self._behind_pair: dict[int, int] = {}  # last two tokens → position behind them
        self._behind_triple: dict[int, int] = {}
        self._num_indexed = 0  # positions that these tables lead to

    def extend(self, token_ids: list[int]) -> None:
        """Take in the tokens that came next."""
        for token_id in token_ids:
            if self.source is not None:
                is_right = self.tokens[self.source] == token_id
                self.odds *= math.exp(LEARNING_RATE * (is_right - self._probability(self.num_matched)))
                self.odds = min(max(self.odds, 0.02), 50.0)  # else thousands of equal cases would outlast a change
                self.num_matched += 1
                self.source = self.source + 1 if is_right else None
            self.tokens.append(token_id)
        self._index()
        if self.source is None:
            self._find()

    def guess(self, count: int, least: float) -> list[int]:
        """The next tokens: at most `count`, as long as all of them are right with a probability of `least`."""
        source, guessed = self.source, list[int]()
        if source is None:
            return guessed
        probability = 1.0
        for i in range(count):
            probability *= self._probability(self.num_matched + i)
            if probability < least:
                break
            position = source + i
            # A copy that reaches the end goes on with itself.
            behind_end = position - len(self.tokens)
            guessed.append(self.tokens[position] if behind_end < 0 else guessed[behind_end])
        return guessed

    def _probability(self, num_matched: int) -> float:
        odds = self.odds * (num_matched - 1)
        return odds / (1 + odds)

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
