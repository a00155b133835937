"""Owns the measured cases of paged_attention; torch runs scaled_dot_product_attention on dense copies.
Does not know how they are timed."""

from collections.abc import Callable

import torch
from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.kv_format import KVFormat
from servd_kernels.paged_attention import OP, reference

_Q_HEADS, _KV_HEADS, _HEAD_DIM = 9, 3, 64


def _case(name: str, query_len: int, seq_len: int, requests: int, dtype: torch.dtype) -> Case:
    code = str(dtype).removeprefix("torch.")
    run = OP.bind("cpu", dtype, kv_format=KVFormat(code, code, _KV_HEADS, _HEAD_DIM, 16))

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        inputs = reference.make_inputs(
            [query_len] * requests,
            [seq_len] * requests,
            _Q_HEADS,
            _KV_HEADS,
            _HEAD_DIM,
            dtype=dtype,
            seed=seed,
        )
        q = torch.randn(requests, _Q_HEADS, query_len, _HEAD_DIM).to(dtype)
        k, v = torch.randn(2, requests, _KV_HEADS, seq_len, _HEAD_DIM).to(dtype)
        arguments = tuple(inputs.values())

        def dense() -> torch.Tensor:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=query_len > 1, enable_gqa=True)

        return lambda: run(*arguments), dense

    keys = requests * seq_len
    pairs = requests * (seq_len if query_len == 1 else query_len * (query_len + 1) // 2)
    moved = dtype.itemsize * 2 * _HEAD_DIM * (keys * _KV_HEADS + requests * query_len * _Q_HEADS)
    return Case(f"{name} {code}", make, moved, 4 * pairs * _Q_HEADS * _HEAD_DIM)


CASES = [
    _case(name, *shape, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for name, shape in {
        "decode 32x300": (1, 300, 32),
        "decode 1x8000": (1, 8000, 1),
        "prefill 512": (512, 512, 1),
    }.items()
]
