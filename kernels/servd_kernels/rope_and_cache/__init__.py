"""Owns rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) fused with the cache write.
Does not know how slots were assigned, nor how cos_sin was scaled."""

import torch

from servd_kernels.kv_format import KVFormat
from servd_kernels.registry import Op
from servd_kernels.strides import check_last_stride

OP = Op("rope_and_cache")


def rope_and_cache(
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
    backend: str | None = None,
) -> torch.Tensor:
    """Turns q IN PLACE and returns it; writes turned k, and v, to the cache. k and v stay as they are.

    q [num_tokens, num_q_heads, head_dim]; k, v [num_tokens, num_kv_heads, head_dim]: views of one fused qkv
    will do; float32, bfloat16 or float16, all alike. positions, slot_mapping [num_tokens] int64; slot = block *
    block_size + offset, -1: do not write. cos_sin [max_pos, rotary_dim] float32: cosines, then sines; dimensions from
    rotary_dim on pass through. kv_cache [num_blocks, block_bytes] of kv_format: each token's k and v are rounded to
    their dtype, transformed where the code is rotated (q too, if keys are: dot products stay the same), encoded, and
    stored with their scales, by their own numbers alone. key_order [num_kv_heads, head_dim] int32, for rotated keys:
    dimension i of a head is its dimension key_order[i] before the transform (see servd_kernels.key_order). Raises
    ValueError for shapes, dtypes, positions or slots that do not fit.
    """
    tokens, _, head_dim = q.shape
    kv_format.check(kv_cache)
    if head_dim != kv_format.head_dim:
        raise ValueError(f"q must be [num_tokens, num_q_heads, {kv_format.head_dim}], not {list(q.shape)}")
    shape = (tokens, kv_format.num_kv_heads, head_dim)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} like q, not {tensor.dtype}")
    for name, ids in (("positions", positions), ("slot_mapping", slot_mapping)):
        if ids.shape != (tokens,) or ids.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [{tokens}], not {ids.dtype} {list(ids.shape)}")
    rotary_dim = cos_sin.shape[-1]
    if cos_sin.dim() != 2 or cos_sin.dtype != torch.float32 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(f"cos_sin must be float32 [max_pos, even, <= {head_dim}], not {list(cos_sin.shape)}")
    if not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin must be contiguous, not of strides {list(cos_sin.stride())}")
    order_shape = (kv_format.num_kv_heads, head_dim)
    if key_order is not None and (key_order.shape != order_shape or key_order.dtype != torch.int32):
        raise ValueError(f"key_order must be int32 {list(order_shape)}, not {key_order.dtype} {list(key_order.shape)}")
    check_last_stride(q=q, k=k, v=v, positions=positions, slot_mapping=slot_mapping)
    run = OP.bind(q.device.type, q.dtype, backend, kv_format=kv_format)
    out: torch.Tensor = run(q, k, v, positions, cos_sin, slot_mapping, kv_cache, kv_format, interleaved, key_order)
    return out
