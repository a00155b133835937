"""Owns the timing of kernels: `python -m servd_kernels.bench [op ...]` measures each op's CASES against torch.
Does not know any op: a case is built by the op's bench.py."""

import argparse
import importlib
import itertools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from servd_kernels import native, op_names
from servd_kernels.floor import Meter

_CACHE_BYTES = 192 << 20  # what rotates: several times the last-level cache, which keeps part of what is larger
_SPIN_SECONDS = 0.01  # after it the threads of the one library no longer spin on the cores of the other
_ROUNDS = 4  # of the two measured in turn: a shared machine is not the same from second to second


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement. `make(i)` builds the i-th set of buffers and returns (ours, torch's) calls on it."""

    name: str
    make: Callable[[int], tuple[Callable[[], object], Callable[[], object]]]
    bytes: int  # moved by one call, at least
    flops: int = 0  # 0: bound by memory
    dtype: str = "float32"  # of the unit that computes: a key of Floor.flops


@dataclass(frozen=True, slots=True)
class Timing:
    """What one case took, all in seconds of one call."""

    ours: list[float]  # p20, p50, p80
    theirs: list[float]  # torch's: p20, p50, p80
    floor: float


def time_case(case: Case, meter: Meter, seconds: float = 0.3) -> Timing:
    """Times ours and torch's for about `seconds` each, in turns, and the machine's limits beside them."""
    # Buffers rotate: in a model a layer's weights come from memory, not from the cache.
    copies = max(2, _CACHE_BYTES // case.bytes + 1)
    ours, theirs = zip(*(case.make(i) for i in range(copies)), strict=True)
    turns = (_rotation(ours, seconds / _ROUNDS), _rotation(theirs, seconds / _ROUNDS))
    times: tuple[list[float], list[float]] = ([], [])
    floors = []
    for _ in range(_ROUNDS):
        time.sleep(_SPIN_SECONDS)
        floors.append(meter.measure(0.01).seconds(case.bytes, case.flops, case.dtype))
        for turn, found in zip(turns, times, strict=True):
            time.sleep(_SPIN_SECONDS)
            found.extend(turn())
    return Timing(percentiles(times[0]), percentiles(times[1]), percentiles(floors)[1])


def percentiles(times: list[float]) -> list[float]:
    """p20, p50, p80."""
    ordered = sorted(times)
    return [ordered[len(ordered) * percent // 100] for percent in (20, 50, 80)]


def _rotation(calls: Sequence[Callable[[], object]], seconds: float) -> Callable[[], list[float]]:
    """A function that times the next calls for `seconds`, three at least, the first left out."""
    endless = itertools.cycle(calls)

    def run() -> list[float]:
        times: list[float] = []
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(times) < 3:
            call = next(endless)
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times[1:]

    return run


def line(op: str, case: Case, timing: Timing) -> str:
    """p20/p50/p80, the floor and the median's ratio to it, rates, torch's median and its ratio to ours."""
    low, median, high = timing.ours
    rate = f"{case.flops / median / 1e9:7.1f} GFLOP/s " if case.flops else ""
    return (
        f"{op:16} {case.name:28} {low * 1e6:8.1f} {median * 1e6:8.1f} {high * 1e6:8.1f} us "
        f"floor {timing.floor * 1e6:8.1f} us (x{median / timing.floor:.2f}) "
        f"{case.bytes / median / 1e9:6.1f} GB/s {rate} torch {timing.theirs[1] * 1e6:8.1f} us "
        f"(x{timing.theirs[1] / median:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=op_names())
    parser.add_argument("--threads", type=int, default=native.num_threads())
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    arguments = parser.parse_args()
    native.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    sys.stdout.write(f"torch {torch.__version__}, {arguments.threads} threads, {native.isas()[:1]}\n")
    meter = Meter()
    for op in arguments.ops:
        for case in importlib.import_module(f"servd_kernels.{op}.bench").CASES:
            if arguments.only in case.name:
                sys.stdout.write(line(op, case, time_case(case, meter)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    logging.basicConfig()
    main()
