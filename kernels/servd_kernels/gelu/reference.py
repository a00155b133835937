"""Owns the plain torch GELU that every backend is held to.
Does not know speed."""

from typing import Any

import torch

from servd_kernels.activation import finish, gelu_values


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(
    x: torch.Tensor, approximate: str = "none", out_dtype: torch.dtype | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return finish(gelu_values(x, approximate), x.dtype, out_dtype)


def make_inputs(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": (3 * torch.randn(rows, width, generator=generator)).to(dtype)}
