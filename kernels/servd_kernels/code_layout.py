"""Owns the layout in memory of coded weights and their scales on CPU: panels of columns, words of neighbours.
Does not know what the codes stand for, nor how they are multiplied (common/codes.hpp reads this layout)."""

from torch import Tensor
from torch.nn import functional

from servd_kernels import native

_PANEL = native.Function("code_panel", "")

# Where the neighbours of a word lie: even ones in its low half, odd ones in its high half, both ascending.
_BYTES = [0, 2, 1, 3]
_LOW_NIBBLES, _HIGH_NIBBLES = [0, 4, 1, 5], [2, 6, 3, 7]


def pack_codes(codes: Tensor, bits: int, padding: int) -> Tensor:
    """codes uint8 [out_features, in_features] -> bytes, flat: panels of [in_features / depth][columns] words.

    A word holds depth = 32 / bits neighbours of a column. Columns and neighbours that a last panel or word lacks are
    `padding`.
    """
    depth, panel = 32 // bits, _PANEL.call()
    rows, columns = codes.shape
    padded = functional.pad(codes, (0, -columns % depth, 0, -rows % panel), value=padding)
    words = padded.view(-1, panel, padded.shape[1] // depth, depth).transpose(1, 2)
    if bits == 8:
        return words[..., _BYTES].contiguous().flatten()
    return (words[..., _LOW_NIBBLES] | words[..., _HIGH_NIBBLES] << 4).flatten()


def pack_groups(values: Tensor) -> Tensor:
    """One number for each group: [out_features, num_groups] -> flat panels of [num_groups][columns]; zeros beyond."""
    panel = _PANEL.call()
    padded = functional.pad(values, (0, 0, 0, -len(values) % panel))
    return padded.view(-1, panel, values.shape[1]).transpose(1, 2).contiguous().flatten()
