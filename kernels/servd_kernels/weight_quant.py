"""Owns the rounding of float matrices to codes: weights ahead of time, activations at each step, in plain torch.
Does not know any kernel's layout, nor how the codes are multiplied."""

import torch
from torch import Tensor
from torch.nn import functional

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest e4m3 number


def quantize_int8(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of each row, or of each run of group_size columns (the last may be shorter).

    x [num_rows, num_columns] of any floating dtype -> codes [num_rows, num_columns] int8 in -127..127 and scales
    float32 [num_rows], or [num_rows, num_groups]: absmax / 127, x ~ codes * scales (Dettmers et al. 2022,
    https://arxiv.org/abs/2208.07339). A scale of what holds NaN or infinity is not finite, and its codes are 0.
    """
    groups = _in_groups(x.float(), group_size)
    scales = groups.abs().amax(-1) / 127
    # Times the inverse, as the kernels do: a division for each number would take them longer than the product.
    codes = (groups * (1 / scales).unsqueeze(-1)).nan_to_num(nan=0.0).round().clamp(-127, 127).to(torch.int8)
    return _whole(codes, x.shape[-1]), scales if group_size else scales.squeeze(-1)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 of each row, to nearest even.

    x [num_rows, num_columns] of any floating dtype -> codes [num_rows, num_columns] float8_e4m3fn and scales float32
    [num_rows]: absmax / 448 (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433). A row that holds NaN or
    infinity has a scale that is not finite, and codes 0.
    """
    wide = x.float()
    scales = wide.abs().amax(-1) / FP8_MAX
    codes = (wide / scales.unsqueeze(-1)).nan_to_num(nan=0.0).clamp(-FP8_MAX, FP8_MAX)
    return codes.to(FP8), scales


def quantize_groups(x: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unsigned codes of each run of group_size columns (the last may be shorter), scales, zero points.

    x [num_rows, num_columns] -> codes uint8 [num_rows, num_columns] in 0..2**bits - 1, scales float32 [num_rows,
    num_groups], zeros uint8 [num_rows, num_groups] or None. x ~ (codes - zeros) * scales; symmetric: zeros are
    2**(bits - 1), and the scale's sign puts the largest number on the code that has no opposite, -2**(bits - 1).
    """
    groups = _in_groups(x.float(), group_size)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scales = largest / -middle
        zeros = torch.full_like(scales, middle)
    else:
        least, most = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scales = (most - least) / top
        zeros = (-least / scales).nan_to_num().round()
    codes = ((groups / scales).nan_to_num().round() + zeros).clamp(0, top).to(torch.uint8)
    return _whole(codes, x.shape[-1]), scales.squeeze(-1), None if symmetric else zeros.squeeze(-1).to(torch.uint8)


def rotate(x: Tensor, size: int) -> Tensor:
    """Each run of `size` columns times the normalized Hadamard matrix (Sylvester's), which is its own inverse.

    x [num_rows, num_columns] of any floating dtype -> float32 of that shape; size: a power of two that divides
    num_columns. A product of two rotated factors is the product of the factors, but their outliers are spread, so that
    they round better (Ashkboos et al. 2024, "QuaRot", https://arxiv.org/abs/2404.00456). Butterflies in ascending
    strides: an order that kernels keep, so that their sums are these to the bit.
    """
    out: Tensor = x.float()
    stride = 1
    while stride < size:
        low, high = torch.unflatten(out, -1, (x.shape[-1] // (2 * stride), 2, stride)).unbind(-2)
        out = torch.stack((low + high, low - high), -2).flatten(-3)
        stride *= 2
    rotated: Tensor = out * size**-0.5
    return rotated


def group_count(num_columns: int, group_size: int) -> int:
    """How many runs of group_size columns there are, the last perhaps shorter."""
    return -(-num_columns // group_size)


def spread(per_group: Tensor, group_size: int, num_columns: int) -> Tensor:
    """Each group's number at each of its columns: [num_rows, num_groups] -> [num_rows, num_columns]."""
    return per_group.repeat_interleave(group_size, -1)[:, :num_columns]


def _in_groups(x: Tensor, group_size: int | None) -> Tensor:
    """[num_rows, num_columns] -> [num_rows, num_groups, group_size], zeros at the end."""
    size = group_size or max(1, x.shape[-1])
    count = max(1, group_count(x.shape[-1], size))
    return torch.unflatten(functional.pad(x, (0, count * size - x.shape[-1])), -1, (count, size))


def _whole(groups: Tensor, num_columns: int) -> Tensor:
    return groups.flatten(-2)[:, :num_columns].contiguous()
