"""Owns the measurement of the machine's own limits: what no kernel can be faster than, on this day and machine.
Does not know any kernel (Williams et al. 2009, "Roofline: An Insightful Visual Performance Model")."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from servd_kernels import native

_MULTIPLY_ADD = native.Function("floor_multiply_add", "il")
_OPERATIONS = native.Function("floor_operations", "i", "l")
_READ = native.Function("floor_read", "pl")
_COPY = native.Function("floor_copy", "ppl")

_UNITS = {"float32": 0, "bfloat16": 1, "int8": 2}  # enum Unit of cpu.cpp
_STREAM_BYTES = 256 << 20  # well beyond any last-level cache that this may run on
_ALIGNMENT = 64  # of a cache line, and of the widest store


@dataclass(frozen=True, slots=True)
class Floor:
    """What this machine does at most, on the kernels' threads and with their instruction set."""

    read_gbps: float  # GB/s of memory read, caches missed
    copy_gbps: float  # GB/s of memory copied past the caches, bytes read and bytes written both counted
    flops: dict[str, float]  # operations a second of the unit a dtype runs on: float32, float16, bfloat16, int8

    def seconds(self, moved: int, operations: int = 0, dtype: str = "float32") -> float:
        """The least time, in seconds, of work that reads `moved` bytes and computes `operations` in `dtype`.

        Raises KeyError for a dtype that no unit is measured for.
        """
        return max(moved / self.read_gbps / 1e9, operations / self.flops[dtype])


def measure(seconds: float = 0.25) -> Floor:
    """Measures each limit for about `seconds`. Raises RuntimeError without the native library."""
    return Meter().measure(seconds)


class Meter:
    """Measures again and again in the same 512 MiB: on a shared machine a limit is best measured beside the kernel."""

    def __init__(self) -> None:
        """Raises RuntimeError without the native library."""
        reason = native.missing_reason()
        if reason is not None:
            raise RuntimeError(reason)
        self._source, self._target = (torch.ones(_STREAM_BYTES + _ALIGNMENT, dtype=torch.uint8) for _ in range(2))

    def measure(self, seconds: float = 0.25) -> Floor:
        """Each limit for about `seconds`, with the instruction set and the threads in use.

        Where the instruction set has no unit for a dtype the value is that of the unit that serves it: bfloat16
        without `vdpbf16ps` and float16 are widened to float32.
        """
        flops = {name: _peak(unit, seconds) for name, unit in _UNITS.items()}
        flops["float16"] = flops["float32"]
        source, target, half = _aligned(self._source), _aligned(self._target), _STREAM_BYTES // 2
        read = _best_seconds(lambda: _READ.call(source, _STREAM_BYTES), seconds)
        copy = _best_seconds(lambda: _COPY.call(source, target, half), seconds)
        return Floor(_STREAM_BYTES / read / 1e9, 2 * half / copy / 1e9, flops)


def _peak(unit: int, seconds: float) -> float:
    units = 16 * native.num_threads()
    return units * _OPERATIONS.call(unit) / _best_seconds(lambda: _MULTIPLY_ADD.call(unit, units), seconds)


def _aligned(buffer: torch.Tensor) -> int:
    return (buffer.data_ptr() + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _best_seconds(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit into `seconds`: a limit is what the machine did once, undisturbed."""
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > deadline:
            return best
