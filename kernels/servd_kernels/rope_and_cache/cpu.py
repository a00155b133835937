"""Owns the call of the native rotation and cache write.
Does not know vectors or threads (cpu.cpp)."""

import torch

from servd_kernels import native

_KERNEL = native.Function("rope_and_cache", "plllpllplllppllppllllllllii")


def supports(device: str, dtype: torch.dtype, **axes: int) -> str | None:
    return native.unsupported(device, dtype)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache: torch.Tensor,
    interleaved: bool = False,
) -> torch.Tensor:
    num_tokens, q_heads, head_dim = q.shape
    num_blocks, _, kv_heads, block_size, _ = kv_cache.shape
    max_position, rotary_dim = cos_sin.shape
    q_token, q_head, _ = q.stride()
    k_token, k_head, _ = k.stride()
    v_token, v_head, _ = v.stride()
    block_stride, kv_stride, head_stride, token_stride, _ = kv_cache.stride()
    fault = _KERNEL.call(
        q.data_ptr(), q_token, q_head, q_heads, k.data_ptr(), k_token, k_head, v.data_ptr(), v_token,
        v_head, kv_heads, positions.data_ptr(), cos_sin.data_ptr(), max_position, rotary_dim,
        slot_mapping.data_ptr(), kv_cache.data_ptr(), block_stride, kv_stride, head_stride, token_stride,
        num_blocks, block_size, num_tokens, head_dim, interleaved, native.DTYPES[q.dtype],
    )  # fmt: skip
    if fault == 1:
        raise ValueError(f"positions must be in 0..{max_position - 1}")
    if fault == 2:
        raise ValueError(f"slots must be in -1..{num_blocks * block_size - 1}")
    return q
