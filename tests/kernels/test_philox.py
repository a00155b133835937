"""Owns the tests of Philox-4x32-10 against the known answers of Random123, and of the uniform numbers made of it.
Does not know sampling."""

import pytest
import torch
from servd_kernels.sample.philox import philox_4x32, uniform


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
    def words(text: str) -> torch.Tensor:
        return torch.tensor([[int(word, 16) for word in text.split()]])

    assert torch.equal(philox_4x32(words(counter), words(key)), words(expected))


def test_the_counter_is_the_position_and_the_key_the_seed() -> None:
    seed, position = 0x299F31D0_A4093822, 0x85A308D3_243F6A88 >> 1
    (value,) = uniform(torch.tensor([seed]), torch.tensor([position])).tolist()
    counter = torch.tensor([[position & 0xFFFFFFFF, position >> 32, 0, 0]])
    words = philox_4x32(counter, torch.tensor([[0xA4093822, 0x299F31D0]]))[0].tolist()
    assert value == ((words[1] << 32 | words[0]) >> 11) / 2**53


def test_a_negative_seed_is_its_64_bits() -> None:
    (value,) = uniform(torch.tensor([-1]), torch.tensor([3])).tolist()
    words = philox_4x32(torch.tensor([[3, 0, 0, 0]]), torch.tensor([[0xFFFFFFFF, 0xFFFFFFFF]]))[0].tolist()
    assert value == ((words[1] << 32 | words[0]) >> 11) / 2**53


def test_uniform_is_in_range_even_and_repeatable() -> None:
    seeds = torch.arange(100_000)
    values = uniform(seeds, torch.full((100_000,), 7))
    assert values.min() >= 0 and values.max() < 1
    counts = torch.bincount((values * 100).long(), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 148.2  # chi-square, 99 degrees of freedom, p = 0.001
    assert uniform(seeds[5:6], torch.tensor([7])) == values[5]
    assert (uniform(seeds, torch.full((100_000,), 8)) != values).all()
