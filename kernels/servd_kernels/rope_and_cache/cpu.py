"""Owns the call of the native rotation and cache write.
Does not know vectors or threads (cpu.cpp)."""

import torch

from servd_kernels import native
from servd_kernels.kv_format import KVFormat

_KERNEL = native.Function("rope_and_cache", "plllpllpllppllpppllipi")
_MAX_HEAD_DIM = 1024  # kMaxKvHeadDim of common/kv_side.hpp


def supports(device: str, dtype: torch.dtype, *, kv_format: KVFormat, **axes: object) -> str | None:
    if kv_format.head_dim > _MAX_HEAD_DIM:
        return f"head_dim must be at most {_MAX_HEAD_DIM}, not {kv_format.head_dim}"
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
    key_order: torch.Tensor | None = None,
) -> torch.Tensor:
    num_tokens, q_heads, _ = q.shape
    num_blocks, (max_position, rotary_dim) = len(kv_cache), cos_sin.shape
    q_token, q_head, _ = q.stride()
    k_token, k_head, _ = k.stride()
    v_token, v_head, _ = v.stride()
    fault = _KERNEL.call(
        q.data_ptr(), q_token, q_head, q_heads, k.data_ptr(), k_token, k_head, v.data_ptr(), v_token, v_head,
        positions.data_ptr(), cos_sin.data_ptr(), max_position, rotary_dim, slot_mapping.data_ptr(),
        kv_cache.data_ptr(), kv_format.native_layout.data_ptr(), num_blocks, num_tokens, interleaved,
        None if key_order is None else key_order.data_ptr(), native.DTYPES[q.dtype],
    )  # fmt: skip
    if fault == 1:
        raise ValueError(f"positions must be in 0..{max_position - 1}")
    if fault == 2:
        raise ValueError(f"slots must be in -1..{num_blocks * kv_format.block_size - 1}")
    return q
