"""Owns the measured cases of rope_and_cache; torch runs the reference.
Does not know how they are timed."""

from collections.abc import Callable

import torch

from servd_kernels.bench import Case
from servd_kernels.rope_and_cache import OP, reference


def _case(tokens: int, dtype: torch.dtype) -> Case:
    run = OP.bind("cpu", dtype)

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        arguments = tuple(reference.make_inputs(tokens, 9, 3, 64, dtype=dtype, seed=seed).values())
        return lambda: run(*arguments), lambda: reference.run(*arguments)

    name = f"{tokens} tokens {str(dtype).removeprefix('torch.')}"
    return Case(name, make, 2 * tokens * 15 * 64 * dtype.itemsize)


CASES = [_case(tokens, dtype) for dtype in (torch.float32, torch.bfloat16) for tokens in (1, 32, 512)]
