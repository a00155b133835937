"""The file of a benchmark: how it was made, on what machine, every row.

Knows nothing of how to measure or show.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

import servd
from servd.benchmark.results import SLO, RunResult, Summary
from servd.errors import ConfigError

FORMAT = "servd-bench-1"
PACKAGES = ("aiohttp", "uvloop", "msgspec", "numpy")  # the client's
SECRET_FLAGS = ("--api-key",)


class Machine(msgspec.Struct, kw_only=True, frozen=True):
    """Where the client ran; the server too, if its URL is local."""

    cpu: str
    cores: int  # usable by this process
    memory_bytes: int | None
    kernel: str
    python: str
    packages: dict[str, str]


class Report(msgspec.Struct, kw_only=True):
    """All of one `servd bench`."""

    format: str = FORMAT
    command: str
    servd_version: str
    commit: str | None  # of the folder servd runs from, if it is a git checkout; "+" if files were changed
    started_at: str
    machine: Machine
    url: str
    model: str
    server: str  # what it says of itself
    endpoint: str
    workload: str  # in words
    num_requests: int
    num_clipped: int  # requests cut to the context
    seed: int
    data_sha256: str
    slo: SLO | None = None
    summaries: list[Summary]  # of `runs`, in order
    runs: list[RunResult]


def this_machine() -> Machine:
    """The machine that this process runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cpu=_cpu_name(),
        cores=cores,
        memory_bytes=_memory_bytes(),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def this_commit() -> str | None:
    """The commit that servd runs from, with a + if its files were changed; None outside a checkout."""
    assert servd.__file__ is not None
    command = ("git", "-C", str(Path(servd.__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+")
    try:
        # no tag's name: the bare commit
        found = subprocess.run((*command, "--exclude=*"), capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def command_line(argv: Sequence[str]) -> str:
    """The arguments as one would type them after `servd`, without secrets."""
    shown: list[str] = []
    for argument in argv:
        flag, equals, _ = argument.partition("=")
        if shown and shown[-1] in SECRET_FLAGS:
            shown.append("...")
        else:
            shown.append(f"{flag}=..." if equals and flag in SECRET_FLAGS else argument)
    return "servd " + shlex.join(shown)


def write_report(report: Report, path: Path) -> None:
    """Raises ConfigError if it cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_report(path: Path) -> Report:
    """Raises ConfigError for what is no report."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no result of servd bench: {error}") from None
    if report.format != FORMAT:
        raise ConfigError(f"{path} has the format {report.format!r}; allowed: {FORMAT!r}")
    return report
