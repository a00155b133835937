"""Owns the call of the native linear and the memory of its packed weights.
Does not know the layout (cpu.cpp)."""

import torch

from servd_kernels import native
from servd_kernels.linear.packed import ACTIVATIONS, BoundLinear, PackedWeight

_SIZE = native.Function("linear_packed_size", "lli", "l")
_PACK = native.Function("linear_pack", "plplllli")
_ROWS = native.Function("linear_rows", "pppllli")
_KERNEL = native.Function("linear", "plppplpllliiii")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundLinear:
    return BoundLinear(pack, run)


def pack(weight: torch.Tensor, gated: bool = False) -> PackedWeight:
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    parts = weight.chunk(2) if gated else (weight,)
    rows, columns = parts[0].shape
    code = native.DTYPES[weight.dtype]
    data = torch.empty(len(parts) * _SIZE.call(rows, columns, code), dtype=weight.dtype)
    for first, part in enumerate(parts):
        _PACK.call(part.data_ptr(), part.stride(0), data.data_ptr(), rows, columns, first, len(parts), code)
    take_rows = _ROWS.pinned()

    def unpack_rows(ids: torch.Tensor) -> torch.Tensor:
        if gated:
            raise ValueError("rows of a gated weight are not kept in order: pack it with gated=False")
        ids = ids.contiguous()
        out = torch.empty(len(ids), columns, dtype=data.dtype)
        if take_rows.call(data.data_ptr(), ids.data_ptr(), out.data_ptr(), len(ids), rows, columns, code):
            raise IndexError(f"row ids must be in 0..{rows - 1}")
        return out

    return PackedWeight(data, rows, columns, run, unpack_rows, _KERNEL.pinned(), gated)


def run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    assert packed.kernel is not None, "the weight was packed by another backend"
    if x.stride(1) != 1:
        x = x.contiguous()
    rows = x.shape[0]
    out = torch.empty(rows, packed.out_features, dtype=out_dtype or x.dtype)
    packed.kernel.call(
        x.data_ptr(), x.stride(0), packed.data.data_ptr(), None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(), 0 if residual is None else residual.stride(0),
        out.data_ptr(), rows, packed.out_features, packed.in_features, ACTIVATIONS[activation], packed.gated,
        native.DTYPES[x.dtype], native.DTYPES[out.dtype],
    )  # fmt: skip
    return out
