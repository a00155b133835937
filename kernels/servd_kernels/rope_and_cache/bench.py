"""Owns the measured cases of rope_and_cache; torch runs the reference.
Does not know how they are timed."""

from collections.abc import Callable

import torch

from servd_kernels.bench import Case
from servd_kernels.kv_format import KVFormat
from servd_kernels.rope_and_cache import OP, reference


def _case(tokens: int, dtype: torch.dtype) -> Case:
    code = str(dtype).removeprefix("torch.")
    run = OP.bind("cpu", dtype, kv_format=KVFormat(code, code, 3, 64, 16))

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        arguments = tuple(reference.make_inputs(tokens, 9, 3, 64, dtype=dtype, seed=seed).values())
        return lambda: run(*arguments), lambda: reference.run(*arguments)

    return Case(f"{tokens} tokens {code}", make, 2 * tokens * 15 * 64 * dtype.itemsize)


CASES = [_case(tokens, dtype) for dtype in (torch.float32, torch.bfloat16) for tokens in (1, 32, 512)]
