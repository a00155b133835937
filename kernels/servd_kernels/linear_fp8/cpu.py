"""Owns the call of the native fp8 linear and the memory of its packed weights.
Does not know the layout (code_layout.py)."""

import torch

from servd_kernels import native
from servd_kernels.code_layout import pack_codes, pack_groups
from servd_kernels.linear.packed import ACTIVATIONS
from servd_kernels.linear_fp8.packed import BoundLinear, PackedWeight

_KERNEL = native.Function("linear_fp8", "plppppp" + "lll" + "iiiii")
_FP8 = 3  # kFp8 of common/rows.hpp


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(codes: torch.Tensor, scales: torch.Tensor, activations: str = "none") -> PackedWeight:
    data = pack_codes(codes.view(torch.uint8), 8, 0)
    rows, columns = codes.shape
    return PackedWeight(data, pack_groups(scales.unsqueeze(1)), rows, columns, activations, run, _KERNEL.pinned())


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    x_scales: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    assert packed.kernel is not None, "the weight was packed by another backend"
    if x.stride(1) != 1:
        x = x.contiguous()
    if x_scales is not None:
        x_scales = x_scales.contiguous()
    rows, depth = x.shape
    out = torch.empty(
        rows, packed.out_features, dtype=out_dtype or (torch.float32 if x_scales is not None else x.dtype)
    )
    packed.kernel.call(
        x.data_ptr(), x.stride(0), None if x_scales is None else x_scales.data_ptr(), packed.data.data_ptr(),
        packed.scales.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), rows,
        packed.out_features, depth, native.DTYPES.get(x.dtype, _FP8),
        0 if bias is None else native.DTYPES[bias.dtype], native.DTYPES[out.dtype], ACTIVATIONS[activation],
        packed.activations == "fp8",
    )  # fmt: skip
    return out
