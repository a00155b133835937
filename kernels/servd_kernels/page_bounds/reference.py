"""Owns the plain torch page bounds that every backend is held to.
Does not know speed."""

from typing import Any

import torch

from servd_kernels.kv_format import KVFormat


def supports(device: str, dtype: torch.dtype, **axes: object) -> str | None:
    return None


def check_slots(slot_mapping: torch.Tensor, num_slots: int) -> None:
    """Raises ValueError for a slot outside the cache. Reads the slots: on a GPU that waits for the device."""
    if bool(((slot_mapping < -1) | (slot_mapping >= num_slots)).any()):
        raise ValueError(f"slots must be in -1..{num_slots - 1}")


def round_outwards(x: torch.Tensor, dtype: torch.dtype, is_upper: bool) -> torch.Tensor:
    """float32 to dtype, towards infinity for an upper bound and towards minus infinity for a lower one."""
    rounded = x.to(dtype)
    is_inside = rounded.float() < x if is_upper else rounded.float() > x
    end = torch.tensor(torch.inf if is_upper else -torch.inf, dtype=dtype, device=x.device)
    return torch.where(is_inside, torch.nextafter(rounded, end), rounded)


def run(
    kv_cache: torch.Tensor, kv_format: KVFormat, slot_mapping: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    size = kv_format.block_size
    check_slots(slot_mapping, len(kv_cache) * size)
    last: dict[int, int] = {}
    for slot in slot_mapping.tolist():
        if slot >= 0:
            last[slot // size] = max(slot % size, last.get(slot // size, 0))
    for page, offset in last.items():
        slots = page * size + torch.arange(offset + 1, device=kv_cache.device)
        keys = kv_format.read(kv_cache, kv_format.k, slots)  # [num_keys, num_kv_heads, head_dim]
        bounds[page, :, 0] = round_outwards(keys.amin(0), bounds.dtype, False)
        bounds[page, :, 1] = round_outwards(keys.amax(0), bounds.dtype, True)
    return bounds


def make_inputs(
    num_tokens: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    key: str = "float32",
    key_words: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """One request's tokens on shuffled pages, the last one partly filled; what is not written is 0xFF. `dtype`: of
    the bounds."""
    generator = torch.Generator().manual_seed(seed)
    kv_format = KVFormat(key, key, num_kv_heads, head_dim, block_size, key_words)
    count = -(-num_tokens // block_size)
    pages = torch.randperm(count + 2, generator=generator)[:count]
    tokens = torch.arange(num_tokens)
    slots = pages[tokens // block_size] * block_size + tokens % block_size
    cache = torch.full((count + 2, kv_format.block_bytes), 0xFF, dtype=torch.uint8)
    keys = torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator)
    kv_format.write(cache, kv_format.k, slots, keys)
    bounds = torch.full((count + 2, num_kv_heads, 2, head_dim), torch.nan, dtype=dtype)
    return {"kv_cache": cache, "kv_format": kv_format, "slot_mapping": slots, "bounds": bounds}
