"""Owns the measured cases of swap_blocks; torch runs the reference.
Does not know how they are timed."""

from collections.abc import Callable

from servd_kernels.bench import Case
from servd_kernels.kv_format import KVFormat
from servd_kernels.swap_blocks import OP, reference

_LAYERS = 30


def _case(copies: int, code: str) -> Case:
    run = OP.bind("cpu")
    block_bytes = KVFormat(code, code, 3, 64, 16).block_bytes

    def make(seed: int) -> tuple[Callable[[], object], Callable[[], object]]:
        inputs = reference.make_inputs([block_bytes] * _LAYERS, 3 * copies, 2 * copies, copies, seed=seed)
        arguments = tuple(inputs.values())
        return lambda: run(*arguments), lambda: reference.run(*arguments)

    return Case(f"{copies} blocks x {_LAYERS} layers {code}", make, 2 * copies * _LAYERS * block_bytes)


CASES = [_case(16, code) for code in ("bfloat16", "int8")]
