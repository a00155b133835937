"""Owns the plain torch gate that every backend is held to.
Does not know speed."""

from typing import Any

import torch
from torch.nn import functional

from servd_kernels.activation import finish


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    first, second = x.float().chunk(2, dim=-1)
    return finish(functional.silu(first) * second, x.dtype, out_dtype)


def make_inputs(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": (3 * torch.randn(rows, 2 * width, generator=generator)).to(dtype)}
