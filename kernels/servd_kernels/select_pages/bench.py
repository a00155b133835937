"""Owns the measured cases of select_pages; torch runs the reference.
Does not know how they are timed."""

from collections.abc import Callable

import torch

from servd_kernels.bench import Case
from servd_kernels.select_pages import OP, reference


def _case(requests: int, seq_len: int, top_k: int) -> Case:
    run = OP.bind("cpu", torch.bfloat16)

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        inputs = reference.make_inputs([seq_len] * requests, 9, 3, 64, top_k, dtype=torch.bfloat16, seed=seed)
        arguments = tuple(inputs.values())
        return lambda: run(*arguments), lambda: reference.run(*arguments)

    return Case(f"{requests} x {seq_len} tokens, {top_k} pages", make, requests * seq_len // 16 * 3 * 2 * 64 * 2)


CASES = [_case(1, 8000, 64), _case(32, 2048, 32)]
