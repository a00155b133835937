"""Owns the gate of SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202).
Does not know the projections around it."""

import torch

from servd_kernels.registry import Op

OP = Op("silu_and_mul")


def silu_and_mul(x: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """silu(first half) * second half of the last dimension, in float32 inside.

    x [..., 2 * width] -> [..., width]; float32, bfloat16 or float16. Raises ValueError for an odd last dimension.
    """
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"the last dimension of x must be even, not {list(x.shape)}")
    run = OP.bind(x.device.type, x.dtype, backend, width=x.shape[-1] // 2)
    out: torch.Tensor = run(x)
    return out
