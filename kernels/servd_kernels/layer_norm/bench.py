"""Owns the measured cases of layer_norm.
Does not know how they are timed."""

from torch.nn import functional

from servd_kernels.bench import Case
from servd_kernels.layer_norm import OP
from servd_kernels.norm import bench


def cases(device: str) -> list[Case]:
    return bench.cases(
        OP, device, 2, lambda x, hidden, weight, bias: functional.layer_norm(x, (hidden,), weight, bias, bench.EPS)
    )
