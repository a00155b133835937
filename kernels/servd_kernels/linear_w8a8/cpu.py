"""Owns the call of the native W8A8 linear and the memory of its packed weights.
Does not know the layout (code_layout.py)."""

import torch

from servd_kernels import native
from servd_kernels.code_layout import pack_codes, pack_groups
from servd_kernels.coded_cpu import END, end_of, pointer, unit_columns
from servd_kernels.coded_linear import BoundLinear
from servd_kernels.linear_w8a8.packed import PackedWeight

_KERNEL = native.Function("linear_w8a8", "plippp" + "llll" + END)
_CODES = 4  # kCodes of common/rows.hpp


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(
    codes: torch.Tensor, scales: torch.Tensor, activation_group: int | None = None, gated: bool = False,
    rotation: int | None = None,
) -> PackedWeight:  # fmt: skip
    # The processor multiplies unsigned bytes by signed ones: weights are the unsigned, 128 more than they are.
    data = pack_codes(codes.view(torch.uint8) ^ 128, 8, 128, gated)
    rows, columns = codes.shape
    return PackedWeight(
        data, pack_groups(scales.unsqueeze(1), gated), rows // 2 if gated else rows, columns, activation_group,
        rotation, gated, run, _KERNEL.pinned(),
    )  # fmt: skip


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scales: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    assert packed.kernel is not None, "the weight was packed by another backend"
    x = unit_columns(x)
    if x_scales is not None:
        x_scales = x_scales.contiguous()
    rows, depth = x.shape
    out_dtype = out_dtype or (torch.float32 if x_scales is not None else x.dtype)
    out = torch.empty(rows, packed.out_features, dtype=out_dtype)
    packed.kernel.call(
        x.data_ptr(), x.stride(0), native.DTYPES.get(x.dtype, _CODES), pointer(x_scales), packed.data.data_ptr(),
        packed.scales.data_ptr(), rows, depth, packed.activation_group or max(64, (depth + 63) // 64 * 64),
        packed.rotation or 0, *end_of(out, bias, residual, activation, packed.gated),
    )  # fmt: skip
    return out
