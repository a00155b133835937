"""Prompt look-up: which earlier place is copied, how far, and what being right or wrong teaches."""

from __future__ import annotations

import random

from servd.worker.prompt_lookup import PromptLookup


def after(tokens: list[int], odds: float = 1.0) -> PromptLookup:
    lookup = PromptLookup(odds)
    lookup.extend(tokens)
    return lookup


def test_the_most_recent_occurrence_of_the_last_three_tokens_is_copied() -> None:
    assert after([1, 2, 3, 40, 9, 1, 2, 3, 50, 51, 8, 1, 2, 3]).guess(3, 0.0) == [50, 51, 8]


def test_three_tokens_come_before_a_more_recent_two() -> None:
    assert after([1, 2, 3, 40, 8, 2, 3, 50, 9, 1, 2, 3]).guess(1, 0.0) == [40]
    assert after([1, 2, 3, 40, 8, 2, 3, 50, 9, 2, 3]).guess(1, 0.0) == [50]


def test_nothing_is_guessed_where_nothing_was_seen_before() -> None:
    assert after([1, 2, 3, 4, 5]).guess(4, 0.0) == []
    assert after([]).guess(4, 0.0) == after([1]).guess(4, 0.0) == after([1, 1]).guess(4, 0.0) == []


def test_a_copy_that_reaches_the_end_goes_on_with_itself() -> None:
    assert after([5, 6, 7, 5, 6]).guess(8, 0.0) == [7, 5, 6, 7, 5, 6, 7, 5]
    assert after([5, 5, 5]).guess(4, 0.0) == [5, 5, 5, 5]


def test_a_copy_that_was_right_is_followed_on_past_a_more_recent_place() -> None:
    lookup = after([1, 2, 3, 4, 5, 6, 0, 4, 5, 7, 0, 1, 2, 3])
    lookup.extend([4, 5])
    assert lookup.guess(1, 0.0) == [6]


def test_tokens_may_come_one_by_one_or_together() -> None:
    tokens = random.Random(0).choices(range(4), k=300)
    whole, pieces = after(tokens), PromptLookup(1.0)
    for begin in range(0, 300, 7):
        pieces.extend(tokens[begin : begin + 7])
    assert pieces.tokens == whole.tokens == tokens
    single = PromptLookup(1.0)
    for token in tokens:
        single.extend([token])
        assert single.source is None or single.source < len(single.tokens)
    assert single.guess(5, 0.0) and pieces.guess(5, 0.0)


def test_the_longer_the_match_the_further_it_is_trusted() -> None:
    words = list(range(100, 140))
    short, long = after(words + words[:3]), PromptLookup(1.0)
    long.extend(words)
    for token in words[:20]:
        long.extend([token])
    assert 0 < len(short.guess(20, 0.5)) < len(long.guess(20, 0.5)) == 20


def test_wrong_guesses_end_guessing_and_right_ones_bring_it_back() -> None:
    rng = random.Random(1)
    lookup = PromptLookup(1.0)
    for _ in range(400):
        lookup.extend([rng.randrange(6)])  # pairs come again at once, what follows them does not
    assert lookup.guess(4, 0.5) == []
    phrase = [rng.randrange(50, 90) for _ in range(12)]
    for token in phrase * 3:
        lookup.extend([token])
    assert lookup.guess(4, 0.5) == phrase[:4]
