"""Owns the plain torch look-up that every backend is held to.
Does not know speed."""

from typing import Any

import torch


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, ids)  # not table[ids], which counts negative ids from the end


def make_inputs(
    count: int, rows: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, hidden + 3, generator=generator).to(dtype)[:, :hidden]
    return {"ids": torch.randint(rows, (count,), generator=generator), "table": table}
