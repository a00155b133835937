#!/usr/bin/env python3
"""Owns the command line of the profiler: a server under load, and where each step's time went, op by op.
Does not know how it is recorded, accounted or drawn (bench/profiling)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
# This folder must not be searched for modules: Python's own `profile` would be this file.
sys.path[:] = [str(ROOT), str(ROOT / "kernels"), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "bench")]

from bench.profiling.account import Account, Limits, front_rows, spans_of, steps_of, worker_rows  # noqa: E402
from bench.profiling.process import FOLDER_VARIABLE, OPS_VARIABLE  # noqa: E402
from bench.profiling.show import flame_graph, table  # noqa: E402
from bench.profiling.spans import difference  # noqa: E402

if TYPE_CHECKING:
    from servd.benchmark import RunResult

REQUESTS = {1: 6, 8: 24}  # by concurrency; else twice as many as run at once: a run of some ten seconds
START_SECONDS, SNAPSHOT_SECONDS = 120, 10


def main(argv: Sequence[str] | None = None) -> int:
    """Profile, print the tables, write JSON and flame graphs. Exit code 1 if the parts do not add up to the wall."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other flags go to `servd serve`.", allow_abbrev=False)
    parser.add_argument("--concurrency", default="1,8,32", metavar="N,...", help="default: 1,8,32")
    parser.add_argument("--requests", type=int, metavar="N", help="at each; default: some ten seconds' worth")
    parser.add_argument("--no-ops", action="store_true", help="leave kernels alone: steps as in production")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--flame", type=Path, metavar="FOLDER", help="draw profile-cN.svg there")
    parser.add_argument("--port", type=int, default=0, help="HTTP; default: a free one")
    arguments, serve_flags = parser.parse_known_args(argv)
    port = arguments.port or free_port()
    levels = [int(level) for level in arguments.concurrency.split(",")]
    records = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {FOLDER_VARIABLE: folder, OPS_VARIABLE: str(int(not arguments.no_ops))}
        with serving(port, serve_flags, Path(folder)) as processes:
            for level in levels:
                count = arguments.requests or REQUESTS.get(level, 2 * level)
                records.append(record(port, level, count, processes))
    stand, limits = measure_limits()
    accounts = [make_account(level, *record, limits) for level, record in zip(levels, records, strict=True)]
    sys.stdout.write(f"{stand}\n`servd serve {' '.join(serve_flags)}`\n\n" + "\n".join(map(table, accounts)) + "\n")
    if arguments.json:
        content = {"command": sys.argv, "machine": stand, "runs": [account.as_dict() for account in accounts]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.flame:
        draw(arguments.flame, accounts, records)
    return 0 if all(account.agrees for account in accounts) else 1


@contextlib.contextmanager
def serving(port: int, flags: Sequence[str], folder: Path) -> Iterator[dict[str, Recorded]]:
    """A server whose processes record themselves, from its health to its end."""
    command = [sys.executable, "-m", "bench.profiling.process", "serve", "--port", str(port), "--grpc-port", "-1"]
    command += ["--log-level", "warning", *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"profile: the server did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield {name: Recorded(folder, name) for name in ("front", "worker")}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def is_healthy(port: int) -> bool:
    """Whether the server takes requests."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class Recorded:
    """A process that answers SIGUSR1 with its next snapshot."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._pid = int((folder / f"{name}.pid").read_text())
        self._count = 0

    def snapshot(self) -> dict[str, Any]:
        """Its tree and clocks, now. Raises TimeoutError."""
        os.kill(self._pid, signal.SIGUSR1)
        path = self._folder / f"{self._name}-{self._count}.json"
        self._count += 1
        deadline = time.monotonic() + SNAPSHOT_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self._pid} ({self._name}) wrote no snapshot")
            time.sleep(0.002)
        content: dict[str, Any] = json.loads(path.read_text())
        return content


def record(
    port: int, concurrency: int, count: int, processes: dict[str, Recorded]
) -> tuple[RunResult, dict[str, dict[str, Any]]]:
    """One run of load, and by process what it did in that time."""
    run = asyncio.run(prepare(port, concurrency, count))
    run()  # warm caches and branch predictors; the next run has prompts of its own
    before = {name: process.snapshot() for name, process in processes.items()}
    result = run()
    after = {name: process.snapshot() for name, process in processes.items()}
    meanwhile = {}
    for name, last in after.items():
        first = before[name]
        clocks = {key: last[key] - first[key] for key in ("thread_seconds", "process_seconds")}
        tree = difference(last["tree"], first["tree"])
        meanwhile[name] = {"tree": tree, "span_seconds": last["span_seconds"], **clocks}
    errors = result.summary().errors
    if errors:
        raise SystemExit(f"profile: requests failed: {errors}")
    return result, meanwhile


async def prepare(port: int, concurrency: int, count: int) -> Callable[[], RunResult]:
    """Chat-like requests of token ids, ready to be sent `concurrency` at a time."""
    from servd.benchmark import RequestOptions, WorkloadSpec, find_server, make_workload, read_corpus, run_closed_loop
    from servd.benchmark.requests import clip_to_context
    from servd.eval.text import python_help

    options = RequestOptions()
    server = await find_server(f"http://127.0.0.1:{port}", None, options)
    corpus = await read_corpus(server, python_help(), options, as_ids=True)
    requests = make_workload(corpus, WorkloadSpec(num_requests=count))
    if server.max_model_len is not None:
        requests, _ = clip_to_context(requests, server.max_model_len)
    return lambda: asyncio.run(run_closed_loop(server.url, server.model, requests, concurrency, options=options))


def measure_limits() -> tuple[str, Limits]:
    """The machine in a line, and its limits, once the server is gone."""
    from servd_kernels import stands

    stand = stands.stand_for("cpu", None)
    return stand.describe(), stand.floor()


def make_account(concurrency: int, result: RunResult, meanwhile: dict[str, dict[str, Any]], limits: Limits) -> Account:
    """The run's time by parts."""
    summary = result.summary()
    worker, front = meanwhile["worker"], meanwhile["front"]
    return Account(
        concurrency=concurrency,
        wall=result.wall_s,
        steps=steps_of(worker["tree"]),
        output_tokens=summary.output_tokens,
        worker=worker_rows(worker["tree"], limits),
        front=front_rows(front["tree"], front["thread_seconds"], result.wall_s),
        processors={
            "worker": worker["process_seconds"], "front": front["process_seconds"], "client": result.client_cpu_s,
        },
        recording=spans_of(worker["tree"]) * worker["span_seconds"],
        latencies={"ttft_ms_p50": summary.ttft_ms.p50, "itl_ms_p50": summary.itl_ms.p50},
    )  # fmt: skip


def draw(folder: Path, accounts: list[Account], records: list[tuple[RunResult, dict[str, dict[str, Any]]]]) -> None:
    """A flame graph of each run."""
    folder.mkdir(parents=True, exist_ok=True)
    for account, (_, meanwhile) in zip(accounts, records, strict=True):
        title = f"{account.concurrency} at a time, {account.wall:.2f} s: the worker, and the front's processor time"
        trees = {name: meanwhile[name]["tree"] for name in ("worker", "front")}
        (folder / f"profile-c{account.concurrency}.svg").write_text(flame_graph(title, trees, account.wall))


if __name__ == "__main__":
    sys.exit(main())
