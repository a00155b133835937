"""Owns the plain torch rotation and cache write that every backend is held to.
Does not know speed."""

from typing import Any

import torch

from servd_kernels.kv_format import KVFormat, hadamard


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def check_values(positions: torch.Tensor, max_position: int, slot_mapping: torch.Tensor, num_slots: int) -> None:
    """Raises ValueError for one out of range. Reads them on the host: on a GPU that waits for the device."""
    if bool(((positions < 0) | (positions >= max_position)).any()):
        raise ValueError(f"positions must be in 0..{max_position - 1}")
    if bool(((slot_mapping < -1) | (slot_mapping >= num_slots)).any()):
        raise ValueError(f"slots must be in -1..{num_slots - 1}")


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
    kv_format: KVFormat,
    interleaved: bool = False,
    key_order: torch.Tensor | None = None,
) -> torch.Tensor:
    check_values(positions, len(cos_sin), slot_mapping, len(kv_cache) * kv_format.block_size)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    turned_q, turned_k = (rotate(x, cos, sin, interleaved) for x in (q, k))
    if kv_format.k.code.is_rotated:
        # The keys stay in float32 until they are encoded: rounding them to bfloat16 would be one error more.
        turned_q, turned_k = (hadamard(_reorder(x, key_order)) for x in (turned_q, turned_k.float()))
    kept = slot_mapping >= 0
    kv_format.write(kv_cache, kv_format.k, slot_mapping[kept], turned_k[kept])
    values = hadamard(v.float()) if kv_format.v.code.is_rotated else v
    kv_format.write(kv_cache, kv_format.v, slot_mapping[kept], values[kept])
    q.copy_(turned_q)
    return q


def _reorder(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """x [num_tokens, heads, head_dim], its dimensions in the order [num_kv_heads, head_dim] of its key/value head."""
    if order is None:
        return x
    return x.gather(2, order.long().repeat_interleave(x.shape[1] // len(order), 0).expand(x.shape))


def make_inputs(
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    key: str | None = None,
    value: str | None = None,
    key_words: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """q, k and v are views of one fused qkv; every seventh token has slot -1; the cache's bytes start as 0xFF.
    `key` and `value` are codes; None: as `dtype`."""
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
    name = str(dtype).removeprefix("torch.")
    kv_format = KVFormat(key or name, value or name, num_kv_heads, head_dim, block_size, key_words)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    slots[6::7] = -1
    return {
        "q": q,
        "k": k,
        "v": v,
        "positions": torch.randperm(max_position, generator=generator)[:num_tokens],
        "cos_sin": torch.cat([angle.cos(), angle.sin()], -1),
        "slot_mapping": slots,
        "kv_cache": torch.full((num_blocks, kv_format.block_bytes), 0xFF, dtype=torch.uint8),
        "kv_format": kv_format,
    }
