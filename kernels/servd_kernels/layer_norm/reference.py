"""Owns the plain torch LayerNorm that every backend is held to.
Does not know speed."""

from typing import Any

import torch


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if residual is not None:
        x = x + residual
    values = x.float()
    deviation = values - values.mean(-1, keepdim=True)
    out = deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps) * weight.float()
    out = (out if bias is None else out + bias.float()).to(x.dtype)
    return out if residual is None else (out, x)


def make_inputs(
    rows: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    residual: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = 1 + torch.randn(rows, hidden, generator=generator)
    return {
        "x": x.to(dtype),
        "weight": (1 + 0.1 * torch.randn(hidden, generator=generator)).to(dtype),
        "bias": (0.1 * torch.randn(hidden, generator=generator)).to(dtype) if bias else None,
        "eps": 1e-5,
        "residual": torch.randn(rows, hidden, generator=generator).to(dtype) if residual else None,
    }
