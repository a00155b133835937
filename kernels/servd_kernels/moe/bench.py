"""Owns the measured cases of moe.
Does not know how they are timed."""

import functools
from typing import Any

import torch
from torch.nn import functional

from servd_kernels.bench import Call, Case
from servd_kernels.moe import OP, reference

_SHAPES = {  # experts, top_k, hidden, intermediate
    "cpu": [(8, 2, 576, 1536), (128, 8, 512, 192)],
    "cuda": [(8, 2, 4096, 14336), (128, 8, 2048, 768)],  # Mixtral-8x7B, Qwen3-30B-A3B
}
_TOKENS = {"cpu": (1, 8, 32, 128, 512), "cuda": (1, 16, 64, 1024)}


def cases(device: str) -> list[Case]:
    dtypes = (torch.bfloat16, torch.float32) if device == "cpu" else (torch.bfloat16,)
    return [
        _case(device, tokens, *shape, dtype)
        for dtype in dtypes
        for shape in _SHAPES[device]
        for tokens in _TOKENS[device]
    ]


@functools.lru_cache(maxsize=1)
def _experts(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[int, tuple[torch.Tensor, ...]]:
    """The copies of one shape's weights, as torch takes them and packed: the cases of a shape share them."""
    return {}


def _case(device: str, tokens: int, experts: int, top_k: int, hidden: int, width: int, dtype: torch.dtype) -> Case:
    run: Any = OP.bind(device, dtype)
    inputs = functools.cache(
        lambda: {k: v.to(device) for k, v in reference.make_inputs(tokens, experts, top_k, hidden, 2, dtype).items()}
    )

    def make(index: int) -> tuple[Call, Call]:
        known: Any = _experts(device, (experts, hidden, width), dtype)
        if index not in known:
            plain = [torch.randn(shape, dtype=dtype, device=device) * shape[-1] ** -0.5
                     for shape in ((experts, 2 * width, hidden), (experts, hidden, width))]  # fmt: skip
            known[index] = (*plain, run.pack(*plain))
        gate_up, down, packed = known[index]
        x, weights, ids = (inputs()[name] for name in ("x", "weights", "ids"))
        return lambda: run(x, packed, weights, ids), lambda: _by_torch(x, gate_up, down, weights, ids)

    used = len(set(reference.make_inputs(tokens, experts, top_k, 1, 1)["ids"].flatten().tolist()))
    moved = dtype.itemsize * (used * 3 * width * hidden + 2 * tokens * hidden)
    name = str(dtype).removeprefix("torch.")
    flops = 6 * tokens * top_k * hidden * width
    return Case(f"{tokens}x{hidden}x{width} {experts} top-{top_k} {name}", make, moved, flops, name)


def _by_torch(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """A loop over the experts that were chosen, as transformers has it."""
    out = torch.zeros_like(x)
    for expert in sorted(set(ids.flatten().tolist())):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        part = functional.linear(functional.silu(gate) * up, down[expert])
        out.index_add_(0, token, (part * weights[token, slot, None]).to(x.dtype))
    return out
