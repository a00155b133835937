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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
# This folder must not be searched for modules: Python's own `profile` would be this file.
sys.path[:] = [str(ROOT), str(ROOT / "kernels"), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "bench")]

from bench.peers.base import Start  # noqa: E402
from bench.peers.process import free_port, running  # noqa: E402
from bench.profiling.account import Account, Limits, front_rows, kernels_of, spans_of, steps_of, worker_rows  # noqa: E402
from bench.profiling.process import FOLDER_VARIABLE, OPS_VARIABLE  # noqa: E402
from bench.profiling.show import flame_graph, table  # noqa: E402
from bench.profiling.spans import difference  # noqa: E402
from servd.errors import ConfigError  # noqa: E402

if TYPE_CHECKING:
    from servd.benchmark import RunResult

    Record = tuple[RunResult, dict[str, dict[str, Any]]]  # what the client saw; by process, its tree and clocks

REQUESTS = {1: 6, 8: 24}  # by concurrency; else twice as many as run at once: a run of some ten seconds
# A replayed step is one call: to see its kernels, each must be called by itself.
NO_REPLAY = "--no-replay-steps"
SNAPSHOT_SECONDS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Profile, print the tables, write JSON and flame graphs. Exit code 1 if the parts do not add up to the wall."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other flags go to `servd serve`.", allow_abbrev=False)
    parser.add_argument("--concurrency", type=counts, default="1,8,32", metavar="N,...", help="default: 1,8,32")
    parser.add_argument("--requests", type=int, metavar="N", help="at each; default: some ten seconds' worth")
    parser.add_argument("--no-ops", action="store_true", help="no second run, in which kernels are called one by one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--flame", type=Path, metavar="FOLDER", help="draw profile-cN.svg there")
    parser.add_argument("--port", type=int, default=0, help="HTTP; default: a free one")
    arguments, flags = parser.parse_known_args(argv)
    if arguments.requests is not None and arguments.requests < 1:
        parser.error(f"argument --requests: {arguments.requests}; allowed: at least 1")
    levels = arguments.concurrency
    runs = [(level, arguments.requests or REQUESTS.get(level, 2 * level)) for level in levels]
    port = arguments.port or free_port()
    try:
        records = record_all(port, flags, runs, ops=False)
        detailed = [] if arguments.no_ops else record_all(port, [*flags, NO_REPLAY], runs, ops=True)
    except ConfigError as error:
        parser.error(error.message)
    stand, limits = measure_limits()
    accounts = [make_account(level, *record) for level, record in zip(levels, records, strict=True)]
    for account, (result, meanwhile) in zip(accounts, detailed, strict=False):
        rate = result.summary().output_tokens_per_s
        account.kernels = kernels_of(meanwhile["worker"]["tree"], limits, rate)
    sys.stdout.write(f"{stand}\n`servd serve {' '.join(flags)}`\n\n" + "\n".join(map(table, accounts)) + "\n")
    if arguments.json:
        content = {"command": sys.argv, "machine": stand, "runs": [account.as_dict() for account in accounts]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.flame:
        draw(arguments.flame, accounts, detailed or records)
    return 0 if all(account.agrees for account in accounts) else 1


def record_all(port: int, flags: Sequence[str], runs: Sequence[tuple[int, int]], *, ops: bool) -> list[Record]:
    """One server, and each of the runs (concurrency, requests) on it."""
    with tempfile.TemporaryDirectory() as folder:
        with serving(port, flags, Path(folder), ops) as processes:
            return [record(port, concurrency, count, processes) for concurrency, count in runs]


@contextlib.contextmanager
def serving(port: int, flags: Sequence[str], folder: Path, ops: bool) -> Iterator[dict[str, Recorded]]:
    """A server whose processes record themselves, from its health to its end. Raises ConfigError if it has none."""
    command = [sys.executable, "-m", "bench.profiling.process", "serve", "--port", str(port), "--grpc-port", "-1"]
    command += ["--log-level", "warning", *flags]
    variables = {
        "PYTHONPATH": os.pathsep.join(sys.path), FOLDER_VARIABLE: str(folder), OPS_VARIABLE: str(int(ops)),
    }  # fmt: skip
    with running(Start(command, variables), port, log=None):
        yield {name: Recorded(folder, name) for name in ("front", "worker")}


def counts(text: str) -> list[int]:
    """Whole numbers above 0 with commas between them."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: whole numbers above 0 with commas between them")
    return numbers


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


def record(port: int, concurrency: int, count: int, processes: dict[str, Recorded]) -> Record:
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


def make_account(concurrency: int, result: RunResult, meanwhile: dict[str, dict[str, Any]]) -> Account:
    """The run's time by parts."""
    summary = result.summary()
    worker, front = meanwhile["worker"], meanwhile["front"]
    return Account(
        concurrency=concurrency,
        wall=result.wall_s,
        steps=steps_of(worker["tree"]),
        output_tokens=summary.output_tokens,
        worker=worker_rows(worker["tree"], None),
        front=front_rows(front["tree"], front["thread_seconds"], result.wall_s),
        processors={
            "worker": worker["process_seconds"], "front": front["process_seconds"], "client": result.client_cpu_s,
        },
        recording=spans_of(worker["tree"]) * worker["span_seconds"],
        latencies={"ttft_ms_p50": summary.ttft_ms.p50, "itl_ms_p50": summary.itl_ms.p50},
    )  # fmt: skip


def draw(folder: Path, accounts: list[Account], records: list[Record]) -> None:
    """A flame graph of each run."""
    folder.mkdir(parents=True, exist_ok=True)
    for account, (result, meanwhile) in zip(accounts, records, strict=True):
        title = f"{account.concurrency} at a time, {result.wall_s:.2f} s: the worker, and the front's processor time"
        trees = {name: meanwhile[name]["tree"] for name in ("worker", "front")}
        (folder / f"profile-c{account.concurrency}.svg").write_text(flame_graph(title, trees, result.wall_s))


if __name__ == "__main__":
    sys.exit(main())
