"""Owns the measured cases of page_bounds; torch runs the reference.
Does not know how they are timed."""

from collections.abc import Callable

import torch

from servd_kernels.bench import Case
from servd_kernels.kv_format import KVFormat
from servd_kernels.page_bounds import OP, reference


def _case(tokens: int, code: str) -> Case:
    kv_format = KVFormat(code, code, 3, 64, 16, key_words=True)
    run = OP.bind("cpu", torch.bfloat16, kv_format=kv_format)

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        inputs = reference.make_inputs(tokens, 3, 64, dtype=torch.bfloat16, key=code, key_words=True, seed=seed)
        arguments = tuple(inputs.values())
        return lambda: run(*arguments), lambda: reference.run(*arguments)

    moved = tokens * 3 * (kv_format.k.row_bytes + kv_format.k.params_bytes) + tokens // 16 * 3 * 2 * 64 * 2
    return Case(f"{tokens} tokens {code}", make, moved)


CASES = [_case(512, code) for code in ("bfloat16", "int8", "int4")]
