"""Owns the measured cases of rope_and_cache; torch runs the reference.
Does not know how they are timed."""

from collections.abc import Callable

import torch

from servd_kernels.bench import Case
from servd_kernels.kv_format import KVFormat
from servd_kernels.rope_and_cache import OP, reference

_PAIRS = {
    "int8": ("int8", "int8"),
    "fp8": ("fp8_e4m3", "fp8_e4m3"),
    "k=int8,v=int4": ("int8", "int4"),
    "int4": ("int4", "int4"),
}


def _case(tokens: int, dtype: torch.dtype, pair: str | None = None) -> Case:
    plain = str(dtype).removeprefix("torch.")
    key, value = _PAIRS[pair] if pair else (plain, plain)
    key_words = pair is not None
    kv_format = KVFormat(key, value, 3, 64, 16, key_words)
    run = OP.bind("cpu", dtype, kv_format=kv_format)

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        inputs = reference.make_inputs(
            tokens, 9, 3, 64, dtype=dtype, key=key, value=value, key_words=key_words, seed=seed
        )
        arguments = tuple(inputs.values())
        return lambda: run(*arguments), lambda: reference.run(*arguments)

    moved = tokens * ((2 * 9 + 2 * 3) * 64 * dtype.itemsize + kv_format.block_bytes // 16)
    return Case(f"{tokens} tokens {plain}{f' to {pair}' if pair else ''}", make, moved)


CASES = [_case(tokens, dtype) for dtype in (torch.float32, torch.bfloat16) for tokens in (1, 32, 512)]
CASES += [_case(tokens, torch.bfloat16, pair) for pair in _PAIRS for tokens in (32, 512)]
