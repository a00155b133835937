"""One server process and all it starts: until it answers, what it takes, and its end.

Reads Linux' /proc. Knows nothing of engines or requests.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.peers.base import Start, usable_cores
from servd.errors import ConfigError

START_SECONDS = 300.0
END_SECONDS = 20.0
POLL_SECONDS = 0.02
PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
LIBC = ctypes.CDLL(None)  # before any fork
PR_SET_PDEATHSIG = 1
STOLEN = 7  # column of /proc/stat: what the hypervisor gave to others
IDLE = (3, 4)  # idle and waiting for a disk


@dataclass(frozen=True, slots=True)
class Server:
    """A process that answers, at the head of its own session."""

    session: int
    port: int
    start_s: float  # until /health said 200

    @property
    def url(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self.port}"

    def memory(self) -> int:
        """Resident bytes of all its processes; pages that several share count once."""
        return sum(_proportional_bytes(process) for process in _processes(self.session))

    def cpu_s(self) -> float:
        """Seconds of processor time that its living processes have used."""
        return sum(_cpu_s(process) for process in _processes(self.session))


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(start: Start, port: int, log: Path | None) -> Iterator[Server]:
    """The server while the block runs; at its end no process of it is left.

    What it writes goes to the log; without one only what it complains of is shown, among this process's own complaints.
    Raises ConfigError that names the log if it ends by itself or does not answer in time.
    """
    with open(log or os.devnull, "wb") as output:
        spawned = time.perf_counter()
        process = subprocess.Popen(
            start.argv, env={**os.environ, **start.env}, stdout=output, stderr=output if log else None,
            start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
        try:
            _wait_until_healthy(process, port, f"see {log}" if log else "see above")
            yield Server(process.pid, port, time.perf_counter() - spawned)
        finally:
            _end(process)


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent is gone, even if that was killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, why: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _is_healthy(port):
        if process.poll() is not None:
            raise ConfigError(f"it ended with {process.returncode} before it answered; {why}")
        if time.monotonic() > deadline:
            raise ConfigError(f"it did not answer within {START_SECONDS:.0f} s; {why}")
        time.sleep(POLL_SECONDS)


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the session to end, then make it."""
    _signal(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    deadline = time.monotonic() + END_SECONDS
    while _processes(process.pid) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for left in _processes(process.pid):
        _signal(int(left.name), signal.SIGKILL, group=False)
    process.wait()


def _signal(pid: int, number: signal.Signals, *, group: bool = True) -> None:
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(pid, number)


def _processes(session: int) -> list[Path]:
    """/proc folders of the session's processes, but for the dead that nobody has waited for."""
    found = []
    for folder in PROC.iterdir():
        fields = _stat(folder) if folder.name.isdigit() else []
        if fields and int(fields[3]) == session and fields[0] != "Z":
            found.append(folder)
    return found


def _stat(process: Path) -> list[str]:
    """The fields of its stat after the name, which may hold anything; empty if it is gone."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_s(process: Path) -> float:
    fields = _stat(process)
    return (int(fields[11]) + int(fields[12])) / TICKS if fields else 0.0


def _proportional_bytes(process: Path) -> int:
    with contextlib.suppress(OSError):
        for line in (process / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


class Disturbance:
    """How much of the usable cores went to neither the server nor this process since it was made."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._begin = self._now()

    def share(self) -> float:
        """0 to 1."""
        (wall, busy, wanted), (wall_0, busy_0, wanted_0) = self._now(), self._begin
        others = (busy - busy_0) - (wanted - wanted_0)
        return max(0.0, others / ((wall - wall_0) * len(usable_cores())))

    def _now(self) -> tuple[float, float, float]:
        cores = {f"cpu{number}" for number in usable_cores()}
        lines = [line.split() for line in (PROC / "stat").read_text().splitlines()]
        columns = [column for line in lines if line[0] in cores for column in enumerate(line[1 : STOLEN + 2])]
        busy = sum(int(ticks) for column, ticks in columns if column not in IDLE) / TICKS
        return time.perf_counter(), busy, self._server.cpu_s() + time.process_time()
