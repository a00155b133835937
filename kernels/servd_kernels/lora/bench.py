"""Owns the measured cases of lora.
Does not know how they are timed."""

import torch

from servd_kernels.bench import Call, Case
from servd_kernels.lora import OP

_ADAPTERS = 8
_SHAPES = {  # rank, in_features, out_features
    "cpu": [(16, 576, 576), (16, 576, 1536), (16, 1536, 576), (16, 4096, 4096)],
    "cuda": [(16, 4096, 4096), (64, 4096, 14336), (64, 14336, 4096)],
}
_ROWS = {"cpu": (1, 32, 512), "cuda": (1, 32, 4096)}


def cases(device: str) -> list[Case]:
    dtypes = (torch.bfloat16, torch.float32) if device == "cpu" else (torch.bfloat16,)
    return [
        _case(device, rows, *shape, dtype) for dtype in dtypes for shape in _SHAPES[device] for rows in _ROWS[device]
    ]


def _case(device: str, rows: int, rank: int, depth: int, columns: int, dtype: torch.dtype) -> Case:
    run = OP.bind(device, dtype, max_rank=rank)
    used = min(rows, _ADAPTERS)

    def make(seed: int) -> tuple[Call, Call]:
        a = torch.randn(_ADAPTERS, 1, rank, depth, dtype=dtype, device=device) * depth**-0.5
        b = torch.randn(_ADAPTERS, columns, rank, dtype=dtype, device=device) * rank**-0.5
        x, y = (torch.randn(rows, width, dtype=dtype, device=device) for width in (depth, columns))
        ids = torch.arange(rows, dtype=torch.int32, device=device) % _ADAPTERS
        ranks, scalings = torch.full_like(ids[:1], rank).repeat(_ADAPTERS), torch.ones(_ADAPTERS, device=device)

        def theirs() -> None:
            for adapter in range(used):
                mine = slice(adapter, None, _ADAPTERS)
                y[mine] += x[mine] @ a[adapter, 0].T @ b[adapter].T

        return lambda: run(y, x, ids, a, b, ranks, scalings, (columns,)), theirs

    name = str(dtype).removeprefix("torch.")
    moved = dtype.itemsize * (used * rank * (depth + columns) + rows * (depth + 2 * columns))
    flops = 2 * rows * rank * (depth + columns)
    return Case(f"{rows}x{depth}x{columns} rank {rank} of {_ADAPTERS} {name}", make, moved, flops, name)
