"""Owns the measured cases of gelu; torch gives no codes, and is timed without.
Does not know how they are timed."""

from torch.nn import functional

from servd_kernels.activation import APPROXIMATIONS, bench
from servd_kernels.bench import Case
from servd_kernels.gelu import OP


def cases(device: str) -> list[Case]:
    return [case for form in APPROXIMATIONS for case in _cases(device, form)]


def _cases(device: str, form: str) -> list[Case]:
    return bench.cases(OP, device, False, lambda x: functional.gelu(x, approximate=form), approximate=form)
