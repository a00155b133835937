"""Owns the call of the native routing.
Does not know vectors or threads (cpu.cpp)."""

import torch

from servd_kernels import native

_KERNEL = native.Function("route", "plpppllliii")


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return native.unsupported(device, dtype)


def run(
    logits: torch.Tensor, top_k: int, renormalize: bool, scoring: str = "softmax", bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, experts = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    weights = torch.empty(tokens, top_k)
    ids = torch.empty(tokens, top_k, dtype=torch.int32)
    _KERNEL.call(
        logits.data_ptr(), logits.stride(0), None if bias is None else bias.data_ptr(), weights.data_ptr(),
        ids.data_ptr(), tokens, experts, top_k, scoring == "sigmoid", renormalize, native.DTYPES[logits.dtype],
    )  # fmt: skip
    return weights, ids
