"""Owns the call of the native linear and the memory of its packed weights.
Does not know the layout (cpu.cpp)."""

import torch

from servd_kernels import native
from servd_kernels.linear.packed import BoundLinear, PackedWeight

_SIZE = native.Function("linear_packed_size", "lli", "l")
_PACK = native.Function("linear_pack", "plplli")
_ROWS = native.Function("linear_rows", "pppllli")
_KERNEL = native.Function("linear", "plppplllii")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(weight: torch.Tensor) -> PackedWeight:
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows, columns = weight.shape
    code = native.DTYPES[weight.dtype]
    data = torch.empty(_SIZE.call(rows, columns, code), dtype=weight.dtype)
    _PACK.call(weight.data_ptr(), weight.stride(0), data.data_ptr(), rows, columns, code)
    take_rows = _ROWS.call

    def unpack_rows(ids: torch.Tensor) -> torch.Tensor:
        ids = ids.contiguous()
        out = torch.empty(len(ids), columns, dtype=data.dtype)
        if take_rows(data.data_ptr(), ids.data_ptr(), out.data_ptr(), len(ids), rows, columns, code):
            raise IndexError(f"row ids must be in 0..{rows - 1}")
        return out

    return PackedWeight(data, rows, columns, run, unpack_rows, _KERNEL.call)


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    assert packed.kernel is not None, "the weight was packed by another backend"
    if x.stride(1) != 1:
        x = x.contiguous()
    rows = x.shape[0]
    out = torch.empty(rows, packed.out_features, dtype=out_dtype or x.dtype)
    packed.kernel(
        x.data_ptr(), x.stride(0), packed.data.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), rows, packed.out_features, packed.in_features, native.DTYPES[x.dtype],
        native.DTYPES[out.dtype],
    )  # fmt: skip
    return out
