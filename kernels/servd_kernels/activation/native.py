"""Owns the call of a native activation: its rows, its output, its scales.
Does not know which activation (each op's cpu.py), nor vectors or threads (common/activation_rows.hpp)."""

import torch

from servd_kernels import native
from servd_kernels.activation import APPROXIMATIONS, as_rows

_CODES = {None: 0, torch.int8: 1, torch.float8_e4m3fn: 2}  # enum RowCode of common/row_codes.hpp


class Activation:
    """One native activation; gated: x holds a gate and a value side by side."""

    def __init__(self, name: str, is_gated: bool) -> None:
        self._kernel = native.Function(name, "plpplliii")
        self._parts = 2 if is_gated else 1

    def __call__(
        self, x: torch.Tensor, approximate: str, out_dtype: torch.dtype | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        rows, dtype = as_rows(x), x.dtype
        *outer, width = x.shape
        width //= self._parts
        out = torch.empty(*outer, width, dtype=out_dtype or dtype)
        scales = None if out_dtype is None else torch.empty(outer, dtype=torch.float32)
        self._kernel.call(
            rows.data_ptr(), rows.stride(0), out.data_ptr(), None if scales is None else scales.data_ptr(),
            len(rows), width, native.DTYPES[dtype], _CODES[out_dtype], APPROXIMATIONS.index(approximate),
        )  # fmt: skip
        return out if scales is None else (out, scales)
