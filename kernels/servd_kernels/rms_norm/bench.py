"""Owns the measured cases of rms_norm.
Does not know how they are timed."""

from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.norm import bench
from servd_kernels.rms_norm import OP


def cases(device: str) -> list[Case]:
    return bench.cases(OP, device, 1, lambda x, hidden, weight: functional.rms_norm(x, (hidden,), weight, bench.EPS))
