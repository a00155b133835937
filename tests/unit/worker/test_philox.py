"""Philox-4x32-10 against the known answers of Random123, and the uniform numbers made of it."""

from __future__ import annotations

import numpy as np
import pytest

from servd.worker.philox import philox_4x32, uniform


# Random123's tests/kat_vectors, lines "philox4x32 10"
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> np.ndarray:
        return np.array([[int(word, 16) for word in text.split()]], np.uint64)

    assert (philox_4x32(words(counter), words(key)) == words(expected)).all()


def test_the_counter_is_the_position_and_the_key_the_seed() -> None:
    (value,) = uniform(np.array([0x299F31D0_A4093822], np.uint64), np.array([0x85A308D3_243F6A88 >> 1], np.int64))
    position = 0x85A308D3_243F6A88 >> 1
    counter = np.array([[position & 0xFFFFFFFF, position >> 32, 0, 0]], np.uint64)
    words = philox_4x32(counter, np.array([[0xA4093822, 0x299F31D0]], np.uint64))[0]
    assert value == ((int(words[1]) << 32 | int(words[0])) >> 11) / 2**53


def test_uniform_is_in_range_even_and_repeatable() -> None:
    seeds = np.arange(100_000, dtype=np.uint64)
    values = uniform(seeds, np.full(100_000, 7))
    assert values.min() >= 0 and values.max() < 1
    counts = np.bincount((values * 100).astype(int), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 148.2  # chi-square, 99 degrees of freedom, p = 0.001
    assert (uniform(seeds[5:6], np.array([7])) == values[5]).all()
    assert (uniform(seeds, np.full(100_000, 8)) != values).all()
