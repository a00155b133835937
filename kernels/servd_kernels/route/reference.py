"""Owns the plain torch routing that every backend is held to.
Does not know speed."""

from typing import Any

import torch


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def run(
    logits: torch.Tensor, top_k: int, renormalize: bool, scoring: str = "softmax", bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    values = logits.float()
    scores = values.softmax(-1) if scoring == "softmax" else values.sigmoid()
    # By the logits where that is the same: scores of different logits may round to one.
    choice = values if bias is None else scores + bias
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return weights, ids.int()


def make_inputs(
    tokens: int, experts: int, dtype: torch.dtype = torch.float32, bias: bool = False, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "logits": (2 * torch.randn(tokens, experts, generator=generator)).to(dtype),
        "bias": torch.randn(experts, generator=generator) if bias else None,
    }
