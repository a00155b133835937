"""Owns counter-based random numbers: Philox-4x32-10 (Salmon et al. 2011), one uniform for each (seed, position).
Does not know sampling; there is no state to carry or to lose."""

import torch

ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # the paper's multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments: golden ratio, sqrt(3) - 1
_LOW = 0xFFFFFFFF


def philox_4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox-4x32-10 of `counter` [n, 4] under `key` [n, 2]; 32-bit words held in int64. Returns [n, 4]."""
    c0, c1, c2, c3 = counter.unbind(1)
    k0, k1 = key.unbind(1)
    for _ in range(ROUNDS):
        # Products wrap around 2^64: shifted as signed numbers and masked, their words are those of unsigned ones.
        product0, product1 = _M0 * c0, _M1 * c2
        c0, c1 = ((product1 >> 32) & _LOW) ^ c1 ^ k0, product1 & _LOW
        c2, c3 = ((product0 >> 32) & _LOW) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=1)


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One float64 number in [0, 1) with 53 random bits for each seed at each position; all [n], the inputs int64."""
    zeros = torch.zeros_like(positions)
    counter = torch.stack([positions & _LOW, (positions >> 32) & _LOW, zeros, zeros], dim=1)
    words = philox_4x32(counter, torch.stack([seeds & _LOW, (seeds >> 32) & _LOW], dim=1))
    bits = ((words[:, 1] << 21) | (words[:, 0] >> 11)) & ((1 << 53) - 1)  # the upper 53 of 64
    return bits.double() * 2.0**-53
