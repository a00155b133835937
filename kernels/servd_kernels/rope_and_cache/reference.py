"""Owns the plain torch rotation and cache write that every backend is held to.
Does not know speed."""

from typing import Any

import torch


def supports(device: str, dtype: torch.dtype, **axes: int) -> str | None:
    return None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [num_tokens, heads, head_dim]; cos, sin [num_tokens, 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    parts = [first * cos - second * sin, second * cos + first * sin]
    out = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([out.to(x.dtype), rest], -1)


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
    num_blocks, _, _, block_size, _ = kv_cache.shape
    if bool(((positions < 0) | (positions >= len(cos_sin))).any()):
        raise ValueError(f"positions must be in 0..{len(cos_sin) - 1}")
    if bool(((slot_mapping < -1) | (slot_mapping >= num_blocks * block_size)).any()):
        raise ValueError(f"slots must be in -1..{num_blocks * block_size - 1}")
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    q.copy_(rotate(q, cos, sin, interleaved))
    kept = slot_mapping >= 0
    block, offset = slot_mapping[kept] // block_size, slot_mapping[kept] % block_size
    kv_cache[block, 0, :, offset] = rotate(k, cos, sin, interleaved)[kept]
    kv_cache[block, 1, :, offset] = v[kept]
    return q


def make_inputs(
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """q, k and v are views of one fused qkv; every seventh token has slot -1; the cache starts as NaN."""
    generator = torch.Generator().manual_seed(seed)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    heads = num_q_heads + 2 * num_kv_heads
    qkv = torch.randn(num_tokens, heads * head_dim, generator=generator).to(dtype)
    qkv = qkv.view(num_tokens, heads, head_dim)
    q, kv = qkv[:, :num_q_heads], qkv[:, num_q_heads:]
    k, v = kv[:, :num_kv_heads], kv[:, num_kv_heads:]
    max_position = num_tokens + 100
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / max(rotary_dim, 1))
    angle = torch.arange(max_position)[:, None] * frequency
    num_blocks = num_tokens // block_size + 3
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    slots[6::7] = -1
    return {
        "q": q,
        "k": k,
        "v": v,
        "positions": torch.randperm(max_position, generator=generator)[:num_tokens],
        "cos_sin": torch.cat([angle.cos(), angle.sin()], -1),
        "slot_mapping": slots,
        "kv_cache": torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype),
    }
