"""Owns the call of the native rotation and cache write.
Does not know vectors or threads (cpu.cpp)."""

import torch

from servd_kernels import native
from servd_kernels.kv_format import KVFormat

_KERNEL = native.Function("rope_and_cache", "plllpllplllppllppllllllllii")


def supports(device: str, dtype: torch.dtype, *, kv_format: KVFormat, **axes: object) -> str | None:
    if kv_format.k.code.dtype != dtype or kv_format.v.code.dtype != dtype or kv_format.key_words:
        return f"it reads rows of {dtype}, not {kv_format.key} keys and {kv_format.value} values"
    return native.unsupported(device, dtype)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache: torch.Tensor,
    kv_format: KVFormat,
    interleaved: bool = False,
) -> torch.Tensor:
    num_tokens, q_heads, head_dim = q.shape
    num_blocks, kv_heads, block_size = len(kv_cache), kv_format.num_kv_heads, kv_format.block_size
    max_position, rotary_dim = cos_sin.shape
    q_token, q_head, _ = q.stride()
    k_token, k_head, _ = k.stride()
    v_token, v_head, _ = v.stride()
    block_stride, head_stride = kv_format.block_bytes // q.itemsize, kv_format.head_bytes // q.itemsize
    kv_stride, token_stride = block_size * head_dim, head_dim
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
