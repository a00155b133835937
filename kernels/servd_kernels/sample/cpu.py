"""Owns the call of the native sampler.
Does not know vectors or threads (cpu.cpp)."""

import ctypes

import torch

from servd_kernels import native
from servd_kernels.sample.params import SampleParams, width

_KERNEL = native.Function("sample", "p")

_ARGUMENTS = (
    "logits", "row_stride", "rows", "vocab", "temperature", "top_p", "min_p", "top_k", "seeds", "positions",
    "num_logprobs", "bias_offsets", "bias_ids", "bias_values", "history_offsets", "history_ids", "num_prompt_tokens",
    "repetition", "presence", "frequency", "allowed", "given", "packed", "width",
)  # fmt: skip


class _Call(ctypes.Structure):
    """`Call` of cpu.cpp: every field has 8 bytes, a pointer or an int64."""

    _fields_ = [(name, ctypes.c_int64) for name in _ARGUMENTS]


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    if dtype != torch.float32:
        return f"it knows torch.float32, not {dtype}"
    return native.unsupported(device, dtype)


def run(logits: torch.Tensor, params: SampleParams) -> torch.Tensor:
    packed = torch.empty(len(logits), width(params), dtype=torch.int32)
    bias, history = params.bias, params.history
    tensors = (
        params.temperature, params.top_p, params.min_p, params.top_k, params.seeds, params.positions,
        params.num_logprobs,
        *((bias.offsets, bias.token_ids, bias.values) if bias else (None,) * 3),
        *(
            (history.offsets, history.token_ids, history.num_prompt_tokens, history.repetition, history.presence,
             history.frequency)
            if history else (None,) * 6
        ),
        params.allowed, params.given, packed,
    )  # fmt: skip
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    call = _Call(logits.data_ptr(), logits.stride(0), len(logits), logits.shape[1], *pointers, packed.shape[1])
    _KERNEL.call(ctypes.addressof(call))
    return packed
