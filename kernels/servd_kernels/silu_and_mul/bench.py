"""Owns the measured cases of silu_and_mul; torch gives no codes, and is timed without.
Does not know how they are timed."""

from torch.nn import functional

from servd_kernels.activation import bench
from servd_kernels.bench import Case
from servd_kernels.silu_and_mul import OP


def cases(device: str) -> list[Case]:
    return bench.cases(OP, device, True, lambda first, second: functional.silu(first) * second)
