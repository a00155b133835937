"""Owns the measured cases of copy_blocks; torch runs the reference.
Does not know how they are timed."""

from collections.abc import Callable

from servd_kernels.bench import Case
from servd_kernels.copy_blocks import OP, reference
from servd_kernels.kv_format import KVFormat

_LAYERS = 30


def _case(copies: int, code: str) -> Case:
    run = OP.bind("cpu")
    block_bytes = KVFormat(code, code, 3, 64, 16).block_bytes

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        arguments = tuple(reference.make_inputs([block_bytes] * _LAYERS, 3 * copies, copies, seed=seed).values())
        return lambda: run(*arguments), lambda: reference.run(*arguments)

    return Case(f"{copies} blocks x {_LAYERS} layers {code}", make, 2 * copies * _LAYERS * block_bytes)


CASES = [_case(copies, code) for code in ("bfloat16", "int8") for copies in (1, 16)]
