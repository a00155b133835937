"""Owns the look-up of a table's rows by token id.
Does not know packed tables (linear's `PackedWeight.rows`), ranks or models."""

import torch

from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

__all__ = ["OP", "embedding"]

OP = Op("embedding")


def embedding(ids: torch.Tensor, table: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """ids [n] int64, table [num_rows, hidden] of float32, bfloat16 or float16 -> its rows [n, hidden], exact.

    Raises ValueError for shapes or dtypes that do not fit, IndexError for an id that has no row.
    """
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be torch.int64 [n], not {ids.dtype} {list(ids.shape)}")
    if table.dim() != 2:
        raise ValueError(f"table must be [num_rows, hidden], not {list(table.shape)}")
    check_last_stride(ids=ids, table=table)
    rows: torch.Tensor = OP.bind(table.device.type, table.dtype, backend)(ids, table)
    return rows
