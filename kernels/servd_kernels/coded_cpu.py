"""Owns the part of a native call that the linears over coded weights share: x, and what follows the product.
Does not know codes or scales (common/linear_end.hpp takes what END spells)."""

from torch import Tensor

from servd_kernels import native
from servd_kernels.linear.packed import ACTIVATIONS

END = "pplpl" + "iiiii"  # bias, residual, its stride, out, its columns; their dtypes, activation, whether gated


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def dtype_code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else native.DTYPES[tensor.dtype]


def unit_columns(x: Tensor) -> Tensor:
    """x with its columns one element apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def end_of(
    out: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None, gated: bool
) -> tuple[int | None, ...]:
    """The arguments that END spells."""
    return (
        pointer(bias), pointer(residual), 0 if residual is None else residual.stride(0), out.data_ptr(), out.shape[1],
        dtype_code(bias), dtype_code(residual), dtype_code(out), ACTIVATIONS[activation], gated,
    )  # fmt: skip
