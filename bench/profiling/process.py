"""Recording within a server's process: wraps its functions, writes a snapshot at each SIGUSR1.

Run as `python -m bench.profiling.process ARGS of servd`, it is the front, and its worker is bench.profiling.worker.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench.profiling import points
from bench.profiling.spans import Recorder

FOLDER_VARIABLE = "SERVD_PROFILE_FOLDER"  # where snapshots go
OPS_VARIABLE = "SERVD_PROFILE_OPS"  # 1: kernels are recorded each by itself


def record_process(name: str, recorder: Recorder, targets: Sequence[tuple[str, str]]) -> None:
    """Wrap the targets and answer SIGUSR1 with FOLDER/NAME-COUNT.json; tell the process id in FOLDER/NAME.pid."""
    missing = [target for label, target in targets if not recorder.wrap(label, target)]
    if missing:
        sys.stderr.write(f"profile: not in this version, so not shown apart: {', '.join(missing)}\n")
    folder = Path(os.environ[FOLDER_VARIABLE])
    span_seconds = recorder.seconds_a_span()
    count = 0

    def write_snapshot(signum: int, frame: FrameType | None) -> None:
        nonlocal count
        usage = resource.getrusage(resource.RUSAGE_SELF)
        content = {
            "tree": recorder.snapshot(),
            "thread_seconds": time.thread_time(),  # of the thread that handles signals: the one that is recorded
            "process_seconds": usage.ru_utime + usage.ru_stime,
            "span_seconds": span_seconds,
        }
        path = folder / f"{name}-{count}.json"
        path.with_suffix(".part").write_text(json.dumps(content))
        path.with_suffix(".part").rename(path)
        count += 1

    signal.signal(signal.SIGUSR1, write_snapshot)
    (folder / f"{name}.pid").write_text(str(os.getpid()))


def main() -> int:
    """The front process: `servd` with its loop recorded, in its own processor time (the worker preempts it)."""
    from servd.cli import main as servd_main
    from servd.executor.multiproc import MultiprocExecutor

    MultiprocExecutor.worker_module = "bench.profiling.worker"
    record_process("front", Recorder(time.thread_time_ns), points.FRONT)
    return servd_main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
