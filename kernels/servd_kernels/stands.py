"""Owns the devices that kernels are measured on: their clock, their limits, their description.
Does not know any op, or how figures are shown (bench.py)."""

import functools
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from servd_kernels import native
from servd_kernels.bench import Call, Stand
from servd_kernels.floor import Floor, Meter

_SPIN_SECONDS = 0.01  # after it the threads of the one library no longer spin on the cores of the other


def stand_for(device: str, threads: int | None = None) -> Stand:
    """The stand of "cpu" or "cuda". Raises ValueError for another, or if there is no GPU."""
    if device == "cpu":
        return CpuStand(threads)
    if device != "cuda":
        raise ValueError(f"device is {device!r}; allowed: cpu, cuda")
    if not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU; allowed: cpu")
    return CudaStand()


class CpuStand:
    """This machine's processor, with the kernels' own threads and as many of torch's."""

    device = "cpu"
    rotating_bytes = 192 << 20  # several times the last-level cache, which keeps part of what is larger

    def __init__(self, threads: int | None = None) -> None:
        """Raises RuntimeError without the native library."""
        native.set_num_threads(threads or native.num_threads())
        torch.set_num_threads(native.num_threads())
        self._meter = Meter()

    def describe(self) -> str:
        loaded = native.library()
        floor = self._meter.measure()
        peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in floor.flops.items())
        return (
            f"{_processor()}, {os.cpu_count()} cores, {native.num_threads()} threads, {loaded.isa if loaded else '-'}; "
            f"{_versions()}; read {floor.read_gbps:.1f} GB/s, copy {floor.copy_gbps:.1f} GB/s; peak GFLOP/s: {peaks}"
        )

    def floor(self) -> Floor:
        time.sleep(_SPIN_SECONDS)
        return self._meter.measure(0.01)

    def time(self, calls: Iterator[Call], seconds: float) -> list[float]:
        """Three calls at least, the first left out."""
        time.sleep(_SPIN_SECONDS)
        times: list[float] = []
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(times) < 3:
            call = next(calls)
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times[1:]


class CudaStand:
    """The current GPU. Its limits are what torch's own copy and matmul reach on it, measured once."""

    device = "cuda"
    rotating_bytes = 512 << 20  # several times the L2 cache of any card so far

    _BATCH = 32  # calls in flight
    _HEAD_START = 4_000_000  # cycles, some ms: the queue fills meanwhile, so that the card never waits for Python

    def describe(self) -> str:
        floor = self.floor()
        peaks = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in floor.flops.items())
        toolkit = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return (
            f"{torch.cuda.get_device_name()}, {toolkit}; {_versions()}; "
            f"copy {floor.copy_gbps:.0f} GB/s; matmul TFLOP/s: {peaks}"
        )

    def floor(self) -> Floor:
        return self._limits

    def time(self, calls: Iterator[Call], seconds: float) -> list[float]:
        """One batch at least, timed by events on the card; the first call, which may compile, comes before."""
        next(calls)()
        times: list[float] = []
        deadline = time.perf_counter() + seconds
        while not times or time.perf_counter() < deadline:
            events = [[_event(), _event()] for _ in range(self._BATCH)]
            torch.cuda.synchronize()
            torch.cuda._sleep(self._HEAD_START)  # type: ignore[no-untyped-call]
            for start, end in events:
                call = next(calls)
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
            times += [start.elapsed_time(end) / 1e3 for start, end in events]
        return times

    @functools.cached_property
    def _limits(self) -> Floor:
        source, target = (torch.zeros(1 << 30, dtype=torch.uint8, device=self.device) for _ in range(2))
        copy = 2 * source.numel() / self._best(lambda: target.copy_(source)) / 1e9
        flops = {}
        size = 8192
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
            a = torch.ones(size, size, dtype=dtype, device=self.device)
            b = torch.ones(size, size, dtype=dtype, device=self.device).T
            multiply = torch._int_mm if dtype == torch.int8 else torch.matmul
            name = str(dtype).removeprefix("torch.")
            flops[name] = 2 * size**3 / self._best(functools.partial(multiply, a, b))
        return Floor(copy, copy, flops)

    def _best(self, call: Call) -> float:
        def calls() -> Iterator[Call]:
            while True:
                yield call

        return min(self.time(calls(), 0.2))


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _processor() -> str:
    """The model's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> str:
    """Of torch, and of this checkout, where there is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"torch {torch.__version__}"
    return f"torch {torch.__version__}, commit {commit}"
