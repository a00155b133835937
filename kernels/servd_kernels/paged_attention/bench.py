"""Owns the measured cases of paged_attention; torch runs scaled_dot_product_attention on dense copies.
Does not know how they are timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.kv_format import KVFormat
from servd_kernels.paged_attention import OP, reference

_BLOCK_SIZE = 16
_FEW_BLOCKS = 32
_STARTER = (9, 3, 64)  # query heads, key/value heads, head size
_LLAMA_8B = (32, 8, 128)

# Query length, sequence length, requests.
_SHAPES = {
    "decode 32x300": (1, 300, 32),
    "decode 32x2048": (1, 2048, 32),
    "decode 1x8000": (1, 8000, 1),
    "prefill 512": (512, 512, 1),
    "prefill 2048": (2048, 2048, 1),
}
_CODES = {  # dtype of the queries, keys, values
    "float32": (torch.float32, "float32", "float32"),
    "bfloat16": (torch.bfloat16, "bfloat16", "bfloat16"),
    "fp8_e4m3": (torch.bfloat16, "fp8_e4m3", "fp8_e4m3"),
    "int8": (torch.bfloat16, "int8", "int8"),
    "k8v4": (torch.bfloat16, "int8", "int4"),
    "int4": (torch.bfloat16, "int4", "int4"),
}


def _arguments(
    kv_format: KVFormat, dtype: torch.dtype, q_heads: int, query_len: int, seq_len: int, requests: int, seed: int
) -> tuple[Any, ...]:
    """As reference.make_inputs gives them, but for the keys and values: a few blocks are encoded, and repeated."""
    heads, dim, size = kv_format.num_kv_heads, kv_format.head_dim, kv_format.block_size
    few = reference.make_inputs(
        [1], [_FEW_BLOCKS * size], q_heads, heads, dim, size, dtype, kv_format.key, kv_format.value, True, seed=seed
    )
    count = -(-seq_len // size)
    blocks = few["block_tables"][0, torch.arange(requests * count) % _FEW_BLOCKS].long()
    tables = 1 + torch.randperm(requests * count, generator=torch.Generator().manual_seed(seed))
    return (
        torch.randn(requests * query_len, q_heads, dim).to(dtype),
        torch.cat([few["kv_cache"][:1], few["kv_cache"][blocks]]),
        kv_format,
        torch.arange(requests + 1, dtype=torch.int32) * query_len,
        torch.full((requests,), seq_len, dtype=torch.int32),
        tables.view(requests, count).to(torch.int32),
        dim**-0.5,
    )


def _case(shape: str, code: str, heads: tuple[int, int, int]) -> Case:
    query_len, seq_len, requests = _SHAPES[shape]
    dtype, key, value = _CODES[code]
    q_heads, kv_heads, head_dim = heads
    kv_format = KVFormat(key, value, kv_heads, head_dim, _BLOCK_SIZE, key_words=True)
    run = OP.bind("cpu", dtype, kv_format=kv_format)

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        arguments = _arguments(kv_format, dtype, q_heads, query_len, seq_len, requests, seed)
        q = torch.randn(requests, q_heads, query_len, head_dim).to(dtype)
        k, v = torch.randn(2, requests, kv_heads, seq_len, head_dim).to(dtype)

        def dense() -> torch.Tensor:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=query_len > 1, enable_gqa=True)

        return lambda: run(*arguments), dense

    pairs = requests * (seq_len if query_len == 1 else query_len * (query_len + 1) // 2)
    moved = requests * seq_len * kv_format.block_bytes // _BLOCK_SIZE
    moved += 2 * dtype.itemsize * requests * query_len * q_heads * head_dim
    name = f"{shape} {code}" + (f" {q_heads}/{kv_heads}/{head_dim}" if heads != _STARTER else "")
    return Case(name, make, moved, 4 * pairs * q_heads * head_dim, str(dtype).removeprefix("torch."))


CASES = [
    *(_case(shape, code, _STARTER) for shape in _SHAPES for code in _CODES),
    *(_case(shape, code, _LLAMA_8B) for shape in ("decode 1x8000", "prefill 512") for code in ("bfloat16", "int8")),
]
