"""Owns the choice of each token's experts and their weights (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538).
Does not know what an expert computes (moe), nor the product that gave the logits."""

import torch

from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

SCORINGS = ("softmax", "sigmoid")
OP = Op("route")


def route(
    logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    scoring: str = "softmax",
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of each token, best first, as (weights float32, ids int32), both [tokens, top_k].

    logits [tokens, num_experts] (float32, bfloat16 or float16; rows may be strided) are scored in float32 by softmax
    (Mixtral, Qwen3-MoE) or sigmoid (DeepSeek-V3); the weights are the scores of the chosen, divided by their sum (at
    least 1e-20) with `renormalize`. The choice is by the logits, or by score + bias (float32 [num_experts], which
    balances the load and does not enter the weights); of equals the lower id wins, and NaN counts as the greatest.
    Raises ValueError for shapes, dtypes, a top_k or a scoring that do not fit.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [tokens, num_experts], not {list(logits.shape)}")
    experts = logits.shape[1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be 1 to num_experts, {experts}, not {top_k}")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, not {scoring!r}")
    if bias is not None and (bias.shape != (experts,) or bias.dtype != torch.float32):
        raise ValueError(f"bias must be torch.float32 [{experts}], not {bias.dtype} {list(bias.shape)}")
    check_last_stride(logits=logits, bias=bias)
    run = OP.bind(logits.device.type, logits.dtype, backend, num_experts=experts)
    result: tuple[torch.Tensor, torch.Tensor] = run(logits, top_k, renormalize, scoring, bias)
    return result
