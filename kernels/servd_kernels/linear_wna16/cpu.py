"""Owns the call of the native weight-only linear and the memory of its packed weights.
Does not know the layout (code_layout.py)."""

import torch

from servd_kernels import native
from servd_kernels.code_layout import pack_codes, pack_groups
from servd_kernels.linear.packed import ACTIVATIONS
from servd_kernels.linear_wna16.packed import BoundLinear, GroupedWeight, PackedWeight

_KERNEL = native.Function("linear_wna16", "plppppppllll" + "iiiiiii")
_MAX_SEGMENT = 256  # kMaxSegment of common/rows.hpp


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    group, depth = axes.get("group_size"), axes.get("in_features")
    if isinstance(group, int) and isinstance(depth, int) and group < depth:
        if group % _MAX_SEGMENT and group not in (32, 64, 128):
            return f"group_size must be 32, 64, 128, a multiple of {_MAX_SEGMENT} or the whole row, not {group}"
    return native.unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(weight: GroupedWeight, activations: str = "none") -> PackedWeight:
    offsets = weight.zeros if weight.minima is None else weight.minima
    rows, columns = weight.codes.shape
    return PackedWeight(
        pack_codes(weight.codes, weight.bits, 2 ** (weight.bits - 1)),
        pack_groups(weight.scales),
        None if offsets is None else pack_groups(offsets),
        rows, columns, weight.bits, weight.group_size, activations, run, _KERNEL.pinned(),
    )  # fmt: skip


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    assert packed.kernel is not None, "the weight was packed by another backend"
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, depth = x.shape
    out = torch.empty(rows, packed.out_features, dtype=out_dtype or x.dtype)
    zeros = minima = None
    if packed.offsets is not None:
        zeros, minima = packed.offsets.data_ptr(), None
        if packed.offsets.dtype != torch.uint8:
            zeros, minima = None, zeros
    packed.kernel.call(
        x.data_ptr(), x.stride(0), packed.data.data_ptr(), packed.scales.data_ptr(), zeros, minima,
        None if bias is None else bias.data_ptr(), out.data_ptr(), rows, packed.out_features, depth,
        min(packed.group_size, depth), packed.bits, native.DTYPES[x.dtype], native.DTYPES[packed.scales.dtype],
        0 if bias is None else native.DTYPES[bias.dtype], native.DTYPES[out.dtype], ACTIVATIONS[activation],
        packed.activations == "int8",
    )  # fmt: skip
    return out
