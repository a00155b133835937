"""Owns the Triton page bounds: one program for a page that was written and a kv head.
Does not know how a row is decoded (triton_kv.py), nor which pages are chosen."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from servd_kernels.kv_format import KVFormat
from servd_kernels.page_bounds.reference import check_slots
from servd_kernels.triton_kv import load_rows
from servd_kernels.triton_support import INTERPRETED, CompileCase, unsupported

_TILE = 2048  # numbers that a program holds at a time


def supports(device: str, dtype: torch.dtype, *, kv_format: KVFormat, **axes: object) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"bounds are float32 or bfloat16, not {dtype}"
    if kv_format.key_words:
        return "it reads keys in rows, not in words (key_words)"
    if kv_format.head_dim > _TILE:
        return f"head_dim must be at most {_TILE}, not {kv_format.head_dim}"
    return unsupported(device, dtype)


@triton.jit
def _store_bound(x, out, mask, IS_UPPER: tl.constexpr, IS_NARROW: tl.constexpr):
    """x float32 as bits, for out *i16 rounded outwards to bfloat16: the bits of a float grow with its magnitude."""
    bits = x.to(tl.int32, bitcast=True)
    if IS_NARROW:
        grows = (bits >= 0) if IS_UPPER else (bits < 0)
        rounded = (bits.to(tl.uint32, bitcast=True) + tl.where(grows, 0xFFFF, 0).to(tl.uint32)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        tl.store(out, rounded.to(tl.int16), mask=mask)
    else:
        tl.store(out, bits, mask=mask)


@triton.jit
def _kernel(
    cache, slots, bounds, num_tokens, kv_heads, block_bytes, head_bytes, params_offset, row_bytes,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr,
    IS_NARROW: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token)
    following = tl.load(slots + token + 1, mask=token + 1 < num_tokens, other=-1)
    # Tokens of a page stand side by side: the last of them takes its bounds for all.
    if (slot < 0) | ((following >= 0) & (following // BLOCK_SIZE == slot // BLOCK_SIZE)):
        return
    last, page = (slot % BLOCK_SIZE).to(tl.int32), slot // BLOCK_SIZE
    base = cache + page * block_bytes + head * head_bytes
    column = tl.arange(0, DIMS)
    in_head = column < HEAD_DIM
    least = tl.full((DIMS,), float("inf"), tl.float32)
    most = tl.full((DIMS,), float("-inf"), tl.float32)
    is_nan = tl.zeros((DIMS,), tl.int32)
    for first in range(0, last + 1, ROWS):
        offset = first + tl.arange(0, ROWS)
        is_key = offset <= last
        mask = is_key[:, None] & in_head[None, :]
        data, params = base + offset * row_bytes, base + params_offset + offset * 2
        x = load_rows(data, params, mask, column, CODE, GROUP, BLOCK_SIZE)
        least = tl.minimum(least, tl.min(tl.where(mask, x, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(mask, x, float("-inf")), 0))
        is_nan = is_nan | tl.max((x != x).to(tl.int32), 0)
    least = tl.where(is_nan > 0, float("nan"), least)
    most = tl.where(is_nan > 0, float("nan"), most)
    out = bounds + (page * kv_heads + head) * (2 * HEAD_DIM) + column
    _store_bound(least, out, in_head, False, IS_NARROW)
    _store_bound(most, out + HEAD_DIM, in_head, True, IS_NARROW)


def _constants(kv_format: KVFormat, dtype: torch.dtype) -> dict[str, Any]:
    dims = triton.next_power_of_2(kv_format.head_dim)
    code = kv_format.k.code
    return {
        "HEAD_DIM": kv_format.head_dim,
        "BLOCK_SIZE": kv_format.block_size,
        "CODE": code.name,
        "GROUP": code.group_size(kv_format.head_dim),
        "IS_NARROW": dtype == torch.bfloat16,
        "ROWS": min(_TILE // dims, triton.next_power_of_2(kv_format.block_size)),
        "DIMS": dims,
    }


def run(
    kv_cache: torch.Tensor, kv_format: KVFormat, slot_mapping: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    if INTERPRETED:  # on a GPU the check would wait for the device
        check_slots(slot_mapping, len(kv_cache) * kv_format.block_size)
    bits = bounds.view(torch.int16 if bounds.dtype == torch.bfloat16 else torch.int32)
    key = kv_format.k
    if len(slot_mapping):
        _kernel[(len(slot_mapping), kv_format.num_kv_heads)](
            kv_cache, slot_mapping, bits, len(slot_mapping), kv_format.num_kv_heads, kv_format.block_bytes,
            kv_format.head_bytes, key.params_offset, key.row_bytes, num_warps=4,
            **_constants(kv_format, bounds.dtype),
        )  # fmt: skip
    return bounds


def compile_cases() -> Iterator[CompileCase]:
    """Llama-3-8B and the starter model, each code, bounds in bfloat16."""
    for kv_heads, head_dim in ((8, 128), (3, 64)):
        for code in ("bfloat16", "fp8_e4m3", "int8", "int4"):
            strides = ("block_bytes", "head_bytes", "params_offset", "row_bytes")
            yield CompileCase(
                name=f"{kv_heads}x{head_dim} {code}",
                kernel=_kernel,
                signature={"cache": "*u8", "slots": "*i64", "bounds": "*i16"}
                | dict.fromkeys(("num_tokens", "kv_heads", *strides), "i32"),
                constants=_constants(KVFormat(code, code, kv_heads, head_dim, 16), torch.bfloat16),
                aligned=("cache", "slots", "bounds", *strides),
                num_warps=4,
            )
