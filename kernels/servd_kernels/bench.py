"""Owns the timing of kernels: `python -m servd_kernels.bench [op ...]` measures each op's CASES against torch.
Does not know any op: a case is built by the op's bench.py."""

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from servd_kernels import native, op_names

_CACHE_BYTES = 64 << 20  # more than the last-level cache of the machines we measure on


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement. `make(i)` builds the i-th set of buffers and returns (ours, torch's) calls on it."""

    name: str
    make: Callable[[int], tuple[Callable[[], object], Callable[[], object]]]
    bytes: int  # moved by one call, at least
    flops: int = 0  # 0: bound by memory


def time_calls(calls: list[Callable[[], object]], seconds: float = 0.3) -> list[float]:
    """Seconds of each call, in turn over the calls, which have buffers of their own: p20, p50, p80."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times) < 2 * len(calls):
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    times = sorted(times[len(calls) :])
    return [times[len(times) * percent // 100] for percent in (20, 50, 80)]


def bench(op: str, case: Case) -> str:
    """One line: p20/p50/p80 in microseconds, GB/s or GFLOP/s at the median, and the ratio to torch."""
    # Buffers rotate: in a model a layer's weights come from memory, not from the cache.
    copies = max(1, min(64, _CACHE_BYTES // case.bytes + 1))
    ours, theirs = zip(*(case.make(i) for i in range(copies)), strict=True)
    low, median, high = time_calls(list(ours))
    torch_median = time_calls(list(theirs))[1]
    rate = f"{case.flops / median / 1e9:7.1f} GFLOP/s " if case.flops else ""
    return (
        f"{op:16} {case.name:28} {low * 1e6:8.1f} {median * 1e6:8.1f} {high * 1e6:8.1f} us "
        f"{case.bytes / median / 1e9:6.1f} GB/s {rate} torch {torch_median * 1e6:8.1f} us "
        f"(x{torch_median / median:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=op_names())
    parser.add_argument("--threads", type=int, default=native.num_threads())
    arguments = parser.parse_args()
    native.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    sys.stdout.write(f"torch {torch.__version__}, {arguments.threads} threads, {native.isas()[:1]}\n")
    for op in arguments.ops:
        for case in importlib.import_module(f"servd_kernels.{op}.bench").CASES:
            sys.stdout.write(bench(op, case) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    logging.basicConfig()
    main()
