"""Owns the call of the native weight-only linear and the memory of its packed weights.
Does not know the layout (code_layout.py)."""

import torch

from servd_kernels import native
from servd_kernels.code_layout import pack_codes, pack_groups
from servd_kernels.coded_cpu import END, dtype_code, end_of, pointer, unit_columns
from servd_kernels.coded_linear import BoundLinear
from servd_kernels.linear_wna16.packed import GroupedWeight, PackedWeight

_KERNEL = native.Function("linear_wna16", "plippipp" + "lllii" + END)
_MAX_SEGMENT = 256  # kMaxSegment of common/rows.hpp


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    group, depth = axes.get("group_size"), axes.get("in_features")
    if isinstance(group, int) and isinstance(depth, int) and group < depth:
        if group % _MAX_SEGMENT and group not in (16, 32, 64, 128):
            return f"group_size must be 16, 32, 64, 128, a multiple of {_MAX_SEGMENT} or the whole row, not {group}"
    return native.unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(weight: GroupedWeight, activations: str = "none", gated: bool = False) -> PackedWeight:
    offsets = weight.zeros if weight.minima is None else weight.minima
    rows, columns = weight.codes.shape
    return PackedWeight(
        pack_codes(weight.codes, weight.bits, 2 ** (weight.bits - 1), gated),
        pack_groups(weight.scales, gated),
        None if offsets is None else pack_groups(offsets, gated),
        rows // 2 if gated else rows, columns, weight.bits, weight.group_size, activations, gated, run, _KERNEL.call,
    )  # fmt: skip


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    assert packed.kernel is not None, "the weight was packed by another backend"
    x = unit_columns(x)
    rows, depth = x.shape
    out = torch.empty(rows, packed.out_features, dtype=out_dtype or x.dtype)
    zeros, minima = pointer(packed.offsets), None
    if packed.offsets is not None and packed.offsets.dtype != torch.uint8:
        zeros, minima = None, zeros
    packed.kernel(
        x.data_ptr(), x.stride(0), dtype_code(x), packed.data.data_ptr(), packed.scales.data_ptr(),
        dtype_code(packed.scales), zeros, minima, rows, depth, min(packed.group_size, depth), packed.bits,
        packed.activations == "int8", *end_of(out, bias, residual, activation, packed.gated),
    )  # fmt: skip
    return out
