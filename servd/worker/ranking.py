"""Which tokens are the likeliest, with no ties: top-k and sorting over distinct integer keys.

Knows nothing of probabilities.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LOW = 0xFFFF_FFFF


def order_keys(logits: Tensor) -> Tensor:
    """Distinct int64 keys that order each row by falling logit, then by rising token id: a larger key is better.

    `logits` is [num_rows, vocab_size] float32 without NaN; the keys have its shape. With them a top-k has no ties to
    break, so that it gives the same tokens with every algorithm, on every device, whatever else is in the batch.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are one value
    flip = bits >> 31  # IEEE floats order like sign-magnitude integers: turn the negative ones around
    flip &= 0x7FFF_FFFF
    bits ^= flip
    keys = bits.to(torch.int64)
    keys <<= 32
    keys |= _LOW - torch.arange(logits.shape[1], device=logits.device)
    return keys


def key_token_ids(keys: Tensor) -> Tensor:
    """The token ids behind `order_keys`."""
    return _LOW - (keys & _LOW)


def best_keys(keys: Tensor, count: int) -> Tensor:
    """The `count` largest keys of each row of `keys` [num_rows, vocab_size], best first. [num_rows, count]"""
    if count == 0:
        return keys[:, :0]
    if keys.device.type != "cpu":
        return keys.topk(count, dim=-1).values
    # NumPy partitions and sorts integers with SIMD: 14 times faster than torch's top-k here, 17 times than its sort.
    array = keys.numpy()
    if count < array.shape[1]:
        array = np.partition(array, array.shape[1] - count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(array, axis=-1)[:, ::-1].copy())
