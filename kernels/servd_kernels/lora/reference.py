"""Owns the plain torch low-rank update that every backend is held to.
Does not know speed: a row at a time, because torch's order of summation depends on the number of rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(
    y: torch.Tensor,
    x: torch.Tensor,
    adapter_ids: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    scalings: torch.Tensor,
    slices: Sequence[int],
) -> None:
    for row, adapter in enumerate(adapter_ids.tolist()):
        if not 0 <= adapter < len(a):
            continue
        rank = min(int(ranks[adapter]), a.shape[2])
        if rank <= 0:
            continue
        begin = 0
        for part, width in zip(a[adapter], slices, strict=True):
            columns = slice(begin, begin + width)
            # A copy: torch's sums depend on where in memory a row begins.
            shrunk = functional.linear(x[row : row + 1].to(torch.float32, copy=True), part[:rank].float())
            update = functional.linear(shrunk, b[adapter, columns, :rank].float())[0]
            y[row, columns] = (y[row, columns].float() + scalings[adapter] * update).to(y.dtype)
            begin += width


def make_inputs(
    rows: int, adapters: int, max_rank: int, depth: int, slices: Sequence[int],
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Ranks from 0 to max_rank, NaN beyond them, and a row in eight without an adapter."""
    generator = torch.Generator().manual_seed(seed)
    columns = sum(slices)
    a = torch.randn(adapters, len(slices), max_rank, depth, generator=generator) * depth**-0.5
    b = torch.randn(adapters, columns, max_rank, generator=generator) * max_rank**-0.5
    ranks = torch.randint(max_rank + 1, (adapters,), generator=generator)
    ranks[0] = max_rank
    unused = torch.arange(max_rank) >= ranks[:, None]
    a.masked_fill_(unused[:, None, :, None], torch.nan)
    b.masked_fill_(unused[:, None, :], torch.nan)
    ids = torch.randint(adapters, (rows,), generator=generator)
    ids[torch.rand(rows, generator=generator) < 0.125] = -1
    return {
        "y": torch.randn(rows, columns, generator=generator).to(dtype),
        "x": torch.randn(rows, depth, generator=generator).to(dtype),
        "adapter_ids": ids.int(),
        "a": a.to(dtype),
        "b": b.to(dtype),
        "ranks": ranks.int(),
        "scalings": torch.rand(adapters, generator=generator) + 0.5,
        "slices": tuple(slices),
    }
