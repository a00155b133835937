"""Owns the measured cases of copy_blocks; torch runs the reference.
Does not know how they are timed."""

from collections.abc import Callable

from servd_kernels.bench import Case
from servd_kernels.copy_blocks import OP, reference

_LAYERS, _BLOCK_NUMEL = 30, 2 * 3 * 16 * 64


def _case(copies: int) -> Case:
    run = OP.bind("cpu")

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        arguments = tuple(reference.make_inputs(_LAYERS, 3 * copies, _BLOCK_NUMEL, copies, seed=seed).values())
        return lambda: run(*arguments), lambda: reference.run(*arguments)

    return Case(f"{copies} blocks x {_LAYERS} layers", make, 2 * copies * _LAYERS * _BLOCK_NUMEL * 4)


CASES = [_case(copies) for copies in (1, 16)]
