"""Owns the measured cases of route.
Does not know how they are timed."""

import torch

from servd_kernels.bench import Call, Case
from servd_kernels.route import OP, reference

_SHAPES = [(8, 2), (128, 8)]  # experts, top_k: Mixtral-8x7B, Qwen3-30B-A3B
_TOKENS = {"cpu": (1, 32, 512), "cuda": (1, 64, 4096)}


def cases(device: str) -> list[Case]:
    return [_case(device, tokens, *shape) for shape in _SHAPES for tokens in _TOKENS[device]]


def _case(device: str, tokens: int, experts: int, top_k: int) -> Case:
    dtype = torch.bfloat16
    run = OP.bind(device, dtype, num_experts=experts)

    def make(seed: int) -> tuple[Call, Call]:
        logits = reference.make_inputs(tokens, experts, dtype, seed=seed)["logits"].to(device)

        def theirs() -> tuple[torch.Tensor, torch.Tensor]:
            weights, ids = logits.float().softmax(-1).topk(top_k)
            return weights / weights.sum(-1, keepdim=True), ids

        return lambda: run(logits, top_k, True), theirs

    return Case(f"{tokens}x{experts} top-{top_k}", make, tokens * (experts * dtype.itemsize + top_k * 8))
