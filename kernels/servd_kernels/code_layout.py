"""Owns the layout in memory of coded weights and their scales on CPU: panels of columns, words of neighbours.
Does not know what the codes stand for, nor how they are multiplied (common/codes.hpp reads this layout)."""

import torch
from torch import Tensor
from torch.nn import functional

from servd_kernels import native

_PANEL = native.Function("code_panel", "")

# Where the neighbours of a word lie: even ones in its low half, odd ones in its high half, both ascending.
_BYTES = [0, 2, 1, 3]
_LOW_NIBBLES, _HIGH_NIBBLES = [0, 4, 1, 5], [2, 6, 3, 7]


def pack_codes(codes: Tensor, bits: int, padding: int, gated: bool = False) -> Tensor:
    """codes uint8 [out_features, in_features] -> bytes, flat: panels of [in_features / depth][columns] words.

    A word holds depth = 32 / bits neighbours of a column. Columns and neighbours that a last panel or word lacks are
    `padding`. With `gated` panels of the upper half of the rows alternate with panels of the lower half.
    """
    depth = 32 // bits
    padded = functional.pad(codes, (0, -codes.shape[1] % depth), value=padding)
    words = torch.unflatten(_panels(padded, padding, gated), -1, (padded.shape[1] // depth, depth)).transpose(1, 2)
    if bits == 8:
        return words[..., _BYTES].contiguous().flatten()
    return (words[..., _LOW_NIBBLES] | words[..., _HIGH_NIBBLES] << 4).flatten()


def pack_groups(values: Tensor, gated: bool = False) -> Tensor:
    """One number for each group: [out_features, num_groups] -> flat panels of [num_groups][columns]; zeros beyond."""
    return _panels(values, 0, gated).transpose(1, 2).contiguous().flatten()


def _panels(matrix: Tensor, padding: int, gated: bool) -> Tensor:
    """[num_panels, columns of a panel, in_features or groups]."""
    parts = []
    for part in matrix.chunk(2) if gated else (matrix,):
        padded = functional.pad(part, (0, 0, 0, -len(part) % _PANEL.call()), value=padding)
        parts.append(torch.unflatten(padded, 0, (len(padded) // _PANEL.call(), _PANEL.call())))
    return torch.stack(parts, 1).flatten(0, 1)
