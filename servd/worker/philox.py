"""Counter-based random numbers: Philox-4x32-10 (Salmon et al. 2011), one uniform for each (seed, position).

Owns the bijection and its mapping to [0, 1). Knows nothing of sampling; there is no state to carry or to lose.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROUNDS = 10
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # the paper's multipliers
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # key increments: golden ratio, sqrt(3) - 1
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)

Words = npt.NDArray[np.uint64]


def philox_4x32(counter: Words, key: Words) -> Words:
    """Philox-4x32-10 of `counter` [n, 4] under `key` [n, 2]; 32-bit words held in uint64. Returns [n, 4]."""
    c0, c1, c2, c3 = counter.T
    k0, k1 = key.T
    for _ in range(ROUNDS):
        product0, product1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (product1 >> _32) ^ c1 ^ k0, product1 & _LOW, (product0 >> _32) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def uniform(seeds: Words, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each seed [n] at each position [n]; returns [n]."""
    count = positions.astype(np.uint64)
    zeros = np.zeros_like(count)
    counter = np.stack([count & _LOW, count >> _32, zeros, zeros], axis=1)
    words = philox_4x32(counter, np.stack([seeds & _LOW, seeds >> _32], axis=1))
    bits = ((words[:, 1] << _32) | words[:, 0]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
