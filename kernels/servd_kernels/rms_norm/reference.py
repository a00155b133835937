"""Owns the plain torch RMSNorm that every backend is held to.
Does not know speed."""

from typing import Any

import torch


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = x + residual
    values = x.float()
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    out = (values * scale * weight.float()).to(x.dtype)
    return out if residual is None else (out, x)


def make_inputs(
    rows: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    residual: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=generator)
    return {
        "x": x.to(dtype),
        "weight": (1 + 0.1 * torch.randn(hidden, generator=generator)).to(dtype),
        "eps": 1e-5,
        "residual": torch.randn(rows, hidden, generator=generator).to(dtype) if residual else None,
    }
