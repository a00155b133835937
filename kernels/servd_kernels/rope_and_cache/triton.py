"""Owns the Triton rotation and cache write: one program for a token and a few of its heads, of q, of k or of v.
Does not know how a row is encoded (triton_kv.py), nor how slots were assigned."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from servd_kernels.kv_format import KVFormat
from servd_kernels.rope_and_cache.reference import check_values
from servd_kernels.triton_kv import hadamard, store_rows, swap
from servd_kernels.triton_support import INTERPRETED, POINTERS, CompileCase, narrow, unsupported

_TILE = 512  # numbers of a program


def supports(device: str, dtype: torch.dtype, *, kv_format: KVFormat, **axes: object) -> str | None:
    if kv_format.key_words:
        return "it writes keys in rows, not in words (key_words)"
    if kv_format.head_dim > _TILE:
        return f"head_dim must be at most {_TILE}, not {kv_format.head_dim}"
    return unsupported(device, dtype)


@triton.jit
def _rotate(
    x, column, cos_sin, position,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """x [rows, dims] float32, turned by the angles of one position."""
    HALF: tl.constexpr = ROTARY // 2
    is_turned = column < ROTARY
    if INTERLEAVED:
        angle, is_first = column // 2, column % 2 == 0
        other = swap(x, 1, ROWS, DIMS)
    else:
        angle, is_first = column % HALF, column < HALF
        if HALF & (HALF - 1) == 0:
            other = swap(x, HALF, ROWS, DIMS)
        else:
            partner = tl.where(is_first, column + HALF, tl.where(is_turned, column - HALF, column))
            other = tl.gather(x, tl.broadcast_to(partner[None, :], x.shape), 1)
    cosine = tl.load(cos_sin + position * ROTARY + angle, mask=is_turned, other=1.0)
    sine = tl.load(cos_sin + position * ROTARY + HALF + angle, mask=is_turned, other=0.0)
    sine = tl.where(is_first, -sine, sine)
    return tl.where(is_turned[None, :], x * cosine[None, :] + other * sine[None, :], x)


@triton.jit
def _reorder(x, column, key_order, head, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """x [ROWS, DIMS], each row in its key/value head's order of dimensions; head [ROWS]."""
    is_in = (column < HEAD_DIM)[None, :]
    order = tl.load(key_order + head[:, None] * HEAD_DIM + column[None, :], mask=is_in, other=0)
    order = tl.where(is_in, order, tl.broadcast_to(column[None, :], (ROWS, DIMS)))
    return tl.gather(x, order, 1)


@triton.jit
def _kernel(
    q, k, v, positions, cos_sin, slots, cache, key_order,
    q_heads, kv_heads, q_token, q_head, k_token, k_head, v_token, v_head,
    block_bytes, head_bytes, k_params, v_data, v_params, k_row_bytes, v_row_bytes,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr,
    K_CODE: tl.constexpr, K_GROUP: tl.constexpr, K_ROTATED: tl.constexpr,
    V_CODE: tl.constexpr, V_GROUP: tl.constexpr, V_ROTATED: tl.constexpr,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_tiles, kv_tiles = tl.cdiv(q_heads, ROWS), tl.cdiv(kv_heads, ROWS)
    column, row = tl.arange(0, DIMS), tl.arange(0, ROWS)
    dtype: tl.constexpr = q.dtype.element_ty
    if part < q_tiles:
        head = part * ROWS + row
        mask = (head < q_heads)[:, None] & (column < HEAD_DIM)[None, :]
        places = q + token * q_token + head[:, None] * q_head + column[None, :]
        x = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        if ROTARY > 0:
            x = _rotate(x, column, cos_sin, tl.load(positions + token), ROTARY, INTERLEAVED, ROWS, DIMS)
        if K_ROTATED:
            x = narrow(x, dtype).to(tl.float32)
            if HAS_ORDER:
                kv_head = tl.minimum(head, q_heads - 1) * kv_heads // q_heads
                x = _reorder(x, column, key_order, kv_head, HEAD_DIM, ROWS, DIMS)
            x = hadamard(x, column, WIDTH, SCALE, ROWS, DIMS)
        tl.store(places, narrow(x, dtype), mask=mask)
        return
    slot = tl.load(slots + token)
    if slot < 0:
        return
    is_key = part < q_tiles + kv_tiles
    head = (part - q_tiles - tl.where(is_key, 0, kv_tiles)) * ROWS + row
    row_mask = head < kv_heads
    mask = row_mask[:, None] & (column < HEAD_DIM)[None, :]
    offset = slot % BLOCK_SIZE
    base = cache + slot // BLOCK_SIZE * block_bytes + head * head_bytes
    if is_key:
        x = tl.load(k + token * k_token + head[:, None] * k_head + column[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        if ROTARY > 0:
            x = _rotate(x, column, cos_sin, tl.load(positions + token), ROTARY, INTERLEAVED, ROWS, DIMS)
            x = narrow(x, dtype).to(tl.float32)
        if K_ROTATED:
            if HAS_ORDER:
                x = _reorder(x, column, key_order, tl.minimum(head, kv_heads - 1), HEAD_DIM, ROWS, DIMS)
            x = hadamard(x, column, WIDTH, SCALE, ROWS, DIMS)
        data, params = base + offset * k_row_bytes, base + k_params + offset * 2
        store_rows(x, data, params, row_mask, mask, column, K_CODE, HEAD_DIM, DIMS, ROWS, K_GROUP, BLOCK_SIZE)
    else:
        x = tl.load(v + token * v_token + head[:, None] * v_head + column[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        if V_ROTATED:
            x = hadamard(x, column, WIDTH, SCALE, ROWS, DIMS)
        data, params = base + v_data + offset * v_row_bytes, base + v_params + offset * 2
        store_rows(x, data, params, row_mask, mask, column, V_CODE, HEAD_DIM, DIMS, ROWS, V_GROUP, BLOCK_SIZE)


def _constants(kv_format: KVFormat, rotary_dim: int, interleaved: bool, has_order: bool) -> dict[str, Any]:
    head_dim = kv_format.head_dim
    dims, width = triton.next_power_of_2(head_dim), head_dim & -head_dim
    rows = min(_TILE // dims, triton.next_power_of_2(kv_format.num_kv_heads))
    constants: dict[str, Any] = {"HEAD_DIM": head_dim, "ROTARY": rotary_dim, "BLOCK_SIZE": kv_format.block_size}
    constants |= {"INTERLEAVED": interleaved, "WIDTH": width, "SCALE": width**-0.5, "ROWS": rows, "DIMS": dims}
    constants["HAS_ORDER"] = has_order
    for name, side in (("K", kv_format.k), ("V", kv_format.v)):
        constants[f"{name}_CODE"] = side.code.name
        constants[f"{name}_GROUP"] = side.code.group_size(head_dim)
        constants[f"{name}_ROTATED"] = side.code.is_rotated
    return constants


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
    if INTERPRETED:  # on a GPU the check would wait for the device
        check_values(positions, len(cos_sin), slot_mapping, len(kv_cache) * kv_format.block_size)
    num_tokens, q_heads, _ = q.shape
    kv_heads, key, value = kv_format.num_kv_heads, kv_format.k, kv_format.v
    constants = _constants(kv_format, cos_sin.shape[1], interleaved, key_order is not None)
    parts = triton.cdiv(q_heads, constants["ROWS"]) + 2 * triton.cdiv(kv_heads, constants["ROWS"])
    if num_tokens:
        _kernel[(num_tokens, parts)](
            q, k, v, positions, cos_sin, slot_mapping, kv_cache, key_order, q_heads, kv_heads,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            kv_format.block_bytes, kv_format.head_bytes, key.params_offset, value.data_offset, value.params_offset,
            key.row_bytes, value.row_bytes, num_warps=1, **constants,
        )  # fmt: skip
    return q


def compile_cases() -> Iterator[CompileCase]:
    """Llama-3-8B and the starter model, each code and the mixed pair."""
    pairs = [(code, code) for code in ("bfloat16", "fp8_e4m3", "int8", "int4")] + [("int8", "int4")]
    for kv_heads, head_dim in ((8, 128), (3, 64)):
        for key, value in pairs:
            kv_format = KVFormat(key, value, kv_heads, head_dim, 16)
            bytes_and_strides = "q_token q_head k_token k_head v_token v_head block_bytes head_bytes k_params v_data "
            bytes_and_strides += "v_params k_row_bytes v_row_bytes"
            yield CompileCase(
                name=f"{kv_heads}x{head_dim} {key} {value}",
                kernel=_kernel,
                signature=dict.fromkeys(("q", "k", "v"), POINTERS[torch.bfloat16])
                | {"positions": "*i64", "cos_sin": "*fp32", "slots": "*i64", "cache": "*u8", "key_order": "*i32"}
                | dict.fromkeys(("q_heads", "kv_heads", *bytes_and_strides.split()), "i32"),
                constants=_constants(kv_format, head_dim, False, kv_format.k.code.is_rotated),
                aligned=(*"q k v positions cos_sin slots cache key_order".split(), *bytes_and_strides.split()),
                num_warps=1,
            )
