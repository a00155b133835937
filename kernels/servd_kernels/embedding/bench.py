"""Owns the measured cases of embedding.
Does not know how they are timed."""

from collections.abc import Callable

import torch
from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.embedding import OP, reference


def _case(device: str, count: int, hidden: int) -> Case:
    run = OP.bind(device, torch.bfloat16)

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        inputs = reference.make_inputs(count, 4096, hidden, torch.bfloat16, seed)
        ids, table = inputs["ids"].to(device), inputs["table"].to(device)
        return lambda: run(ids, table), lambda: functional.embedding(ids, table)

    return Case(f"{count}x{hidden} bfloat16", make, 2 * 2 * count * hidden)


def cases(device: str) -> list[Case]:
    return [_case(device, count, 4096) for count in (1, 32, 512)]
