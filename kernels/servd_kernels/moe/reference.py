"""Owns the plain torch experts that every backend is held to, and that serve where there is no compiler.
Does not know speed: a row at a time, because torch's order of summation depends on the number of rows."""

from typing import Any

import torch
from torch.nn import functional

from servd_kernels.linear.reference import ACTIVATION_FUNCTIONS
from servd_kernels.moe.packed import BoundMoe, PackedExperts


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def bind(device: str, dtype: torch.dtype, **axes: object) -> BoundMoe:
    return BoundMoe(pack, run)


def pack(gate_up: torch.Tensor, down: torch.Tensor) -> PackedExperts:
    """Keeps the weights as they are."""
    experts, hidden, intermediate = down.shape
    return PackedExperts(gate_up, down, experts, hidden, intermediate, run)


def run(
    x: torch.Tensor,
    packed: PackedExperts,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str | None = "silu",
) -> torch.Tensor:
    parts = torch.zeros(*ids.shape, packed.hidden, device=x.device)
    for expert in range(packed.num_experts):
        gate_up, down = packed.gate_up[expert], packed.down[expert]
        for token, slot in (ids == expert).nonzero().tolist():
            # A copy: torch's sums depend on where in memory a row begins.
            row = x[token : token + 1].to(torch.float32, copy=True)
            gate, up = functional.linear(row, gate_up.float()).chunk(2, dim=1)
            if activation is not None:
                gate = ACTIVATION_FUNCTIONS[activation](gate)
            inner = (gate * up).to(x.dtype).float()
            part = functional.linear(inner, down.float())[0]
            parts[token, slot] = weights[token, slot] * part
    total = torch.zeros(x.shape, device=x.device)
    for slot in range(ids.shape[1]):
        total += parts[:, slot]
    return total.to(x.dtype)


def make_inputs(
    tokens: int, experts: int, top_k: int, hidden: int, intermediate: int,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Tensors alone: x, gate_up and down to pack, weights and ids."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, ids = scores.topk(top_k)
    return {
        "x": torch.randn(tokens, hidden, generator=generator).to(dtype),
        "gate_up": (torch.randn(experts, 2 * intermediate, hidden, generator=generator) * hidden**-0.5).to(dtype),
        "down": (torch.randn(experts, hidden, intermediate, generator=generator) * intermediate**-0.5).to(dtype),
        "weights": weights / weights.sum(-1, keepdim=True),
        "ids": ids.int(),
    }
