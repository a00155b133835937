"""`servd bench`: load on any OpenAI-compatible server, and `servd bench compare` for two of its results.

Owns flags and their checks. Knows nothing of how load is made or measured (servd.benchmark).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from servd.cli.command import COMMANDS, Command
from servd.cli.url import DEFAULT_URL, check_url
from servd.errors import ConfigError, RequestFailedError

if TYPE_CHECKING:
    from servd.benchmark import SLO, RequestOptions
    from servd.benchmark.plan import RequestPlan
    from servd.benchmark.report import Report
    from servd.benchmark.session import Load

T = TypeVar("T", int, float)

DEFAULT_CONCURRENCY = "1,8,32"
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
MADE_ONLY = ("input_tokens", "prefix_tokens", "num_prefixes")  # flags for workloads that are made here


class BenchCommand(Command):
    """Sends requests, prints figures."""

    help = "measure a server under load, or compare two measurements"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The server, the load, the requests, where results go; and the `compare` command."""
        server = parser.add_argument_group("server")
        server.add_argument("--url", default=DEFAULT_URL, metavar="URL", help=f"of the server [default: {DEFAULT_URL}]")
        server.add_argument("--model", metavar="NAME", help="to ask for [default: the first that it lists]")
        server.add_argument("--api-key", metavar="TEXT", help="key of the server [default: SERVD_API_KEY]")
        server.add_argument(
            "--endpoint", choices=("completions", "chat"), default="completions", help="route [default: completions]"
        )
        server.add_argument(
            "--max-model-len", type=int, metavar="TOKENS", help="context of the server [default: what it says]"
        )
        _add_load_flags(parser.add_argument_group("load", "a fixed number at a time, or arrivals that wait for nobody"))
        _add_request_flags(parser.add_argument_group("requests"))
        results = parser.add_argument_group("results")
        results.add_argument("--slo", metavar="LIMITS", help="count good answers: ttft=MS,tpot=MS,e2e=MS, some of them")
        results.add_argument("--json", type=Path, metavar="FILE", help="write everything there, every row of it")
        results.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png, .svg; needs matplotlib)")
        compare = parser.add_subparsers(dest="action", metavar="").add_parser(
            "compare", help="compare two files of --json", description="compare two files that --json wrote"
        )
        compare.add_argument("a", type=Path, metavar="A.json", help="before")
        compare.add_argument("b", type=Path, metavar="B.json", help="after")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print figures; exit code 1 if a request failed."""
        if arguments.action == "compare":
            return _compare(arguments.a, arguments.b)
        import uvloop

        from servd.benchmark import SLO

        _check(arguments)
        loads, plan = _read_loads(arguments), _read_plan(arguments)
        slo = SLO.parse(arguments.slo) if arguments.slo is not None else None
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(_bench(arguments, loads, plan, slo))
        _write(report, arguments.json, arguments.plot)
        return 0


COMMANDS.register("bench")(BenchCommand())


def _add_load_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--concurrency", metavar="N,N,...", help=f"requests under way at a time [default: {DEFAULT_CONCURRENCY}]"
    )
    group.add_argument("--rate", metavar="X,X,...", help="arrivals a second, whatever becomes of them [default: none]")
    group.add_argument(
        "--burstiness", type=float, metavar="X",
        help="shape of their gaps' gamma distribution: below 1 in bursts, above 1 evenly [default: 1, Poisson]",
    )  # fmt: skip
    group.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="lengths and arrivals of a trace: Azure's CSV, Mooncake's JSON lines; with --concurrency or --rate, "
        "its lengths alone",
    )  # fmt: skip
    group.add_argument("--trace-speed", type=float, metavar="X", help="times as fast [default: 1]")
    group.add_argument("--trace-limit", type=int, metavar="N", help="its first N requests [default: all]")
    group.add_argument("--repeat", type=int, default=1, metavar="N", help="repetitions of every load [default: 1]")
    group.add_argument("--warmup", type=int, default=8, metavar="N", help="uncounted requests before [default: 8]")


def _add_request_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workload", choices=("chat", "prefix", "file"),
        help="lengths of a chat, a shared prefix of 512 tokens, or --dataset [default: chat, with --dataset file]",
    )  # fmt: skip
    group.add_argument("--dataset", type=Path, metavar="FILE", help="ShareGPT-like JSON, or JSON lines with prompts")
    group.add_argument("--num-requests", type=int, metavar="N", help="a run [default: 64, prefix 32]")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="decides the requests [default: 0]")
    group.add_argument(
        "--salt", type=int, metavar="N", help="decides their first tokens [default: new ones, no cache has seen them]"
    )
    group.add_argument("--input-tokens", metavar="N[:STD]", help="[default: log-normal, 32–512, median 128]")
    group.add_argument("--output-tokens", metavar="N[:STD]", help="[default: log-normal, 32–256, median 96]")
    group.add_argument("--prefix-tokens", type=int, metavar="N", help="in common, before the others [default: 0]")
    group.add_argument("--num-prefixes", type=int, metavar="N", help="different ones, in turn [default: 1]")
    group.add_argument(
        "--prompt", choices=("auto", "ids", "text"), default="auto",
        help="send token ids (exact lengths; needs POST /tokenize) or text [default: auto, ids where that works]",
    )  # fmt: skip
    group.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="answers of exactly the length asked [default: on where the server takes it]",
    )  # fmt: skip
    group.add_argument("--extra-body", metavar="JSON", help="fields to add to every request [default: none]")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one request [default: 600]")


def _read_loads(arguments: argparse.Namespace) -> list[Load]:
    from servd.benchmark.session import Load

    if arguments.concurrency is not None and arguments.rate is not None:
        raise ConfigError(f"--concurrency {arguments.concurrency} and --rate {arguments.rate}: allowed: one of the two")
    if arguments.rate is None and arguments.burstiness is not None:
        raise ConfigError("--burstiness: allowed only with --rate")
    if arguments.rate is not None:
        burstiness = 1.0 if arguments.burstiness is None else arguments.burstiness
        _check_positive("--burstiness", burstiness)
        return [Load(rate=rate, burstiness=burstiness) for rate in _numbers("--rate", arguments.rate, float)]
    if arguments.trace and arguments.concurrency is None:
        return [Load()]
    text = DEFAULT_CONCURRENCY if arguments.concurrency is None else arguments.concurrency
    return [Load(concurrency=level) for level in _numbers("--concurrency", text, int)]


def _numbers(flag: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """Comma-separated positive numbers, each once."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < 1e6 for number in numbers):
        raise ConfigError(f"{flag} is {text!r}; allowed: positive numbers with commas between them")
    return list(dict.fromkeys(numbers))


def _check_positive(flag: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{flag} is {value:g}; allowed: more than 0")


def _check(arguments: argparse.Namespace) -> None:
    """What can be told to be wrong before a server is asked. Raises ConfigError."""
    check_url(arguments.url)
    for flag in ("repeat", "timeout", "trace_speed", "num_requests", "trace_limit", "num_prefixes", "max_model_len"):
        if (value := getattr(arguments, flag)) is not None:
            _check_positive("--" + flag.replace("_", "-"), value)
    for flag in ("warmup", "prefix_tokens"):
        if (value := getattr(arguments, flag)) is not None and value < 0:
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}; allowed: 0 or more")
    if (arguments.workload == "file") != (arguments.dataset is not None) and arguments.workload is not None:
        raise ConfigError(f"--workload {arguments.workload}: allowed: file with --dataset FILE, others without")
    if not arguments.trace and (arguments.trace_speed or arguments.trace_limit):
        raise ConfigError("--trace-speed and --trace-limit: allowed only with --trace")
    if arguments.num_prefixes and not (arguments.prefix_tokens or arguments.workload == "prefix"):
        raise ConfigError("--num-prefixes: allowed only with --prefix-tokens or --workload prefix")
    if arguments.trace and (arguments.workload or arguments.dataset):
        raise ConfigError("--trace has its own requests; allowed: no --workload and no --dataset beside it")
    read_only = "--trace" if arguments.trace else "--dataset" if arguments.dataset else None
    unused = MADE_ONLY + (("output_tokens", "num_requests") if arguments.trace else ())
    for flag in unused if read_only else ():
        if getattr(arguments, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')}: allowed only without {read_only}")
    if arguments.endpoint == "chat" and arguments.prompt == "ids":
        raise ConfigError("--prompt is ids; allowed with --endpoint chat: text")
    for path in (arguments.json, arguments.plot):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise ConfigError(f"{path} is a folder; allowed: a file")
    if arguments.plot and arguments.plot.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot is {arguments.plot}; allowed: a file that ends in {', '.join(PLOT_SUFFIXES)}")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; install servd[plot]")


def _read_options(arguments: argparse.Namespace) -> RequestOptions:
    from servd.benchmark import RequestOptions

    try:
        extra_body: Any = json.loads(arguments.extra_body or "{}")
    except ValueError:
        extra_body = None
    if not isinstance(extra_body, dict):
        raise ConfigError(f"--extra-body is {arguments.extra_body!r}; allowed: a JSON object")
    return RequestOptions(
        endpoint=arguments.endpoint,
        ignore_eos=arguments.ignore_eos,
        extra_body=extra_body,
        api_key=arguments.api_key or os.environ.get("SERVD_API_KEY"),
        timeout=arguments.timeout,
    )


def _read_plan(arguments: argparse.Namespace) -> RequestPlan:
    from servd.benchmark import Lengths, WorkloadSpec
    from servd.benchmark.plan import RequestPlan

    spec = WorkloadSpec.shared_prefix() if arguments.workload == "prefix" else WorkloadSpec()
    given: dict[str, Any] = {"seed": arguments.seed}
    for name in ("num_requests", "prefix_tokens", "num_prefixes"):
        if (value := getattr(arguments, name)) is not None:
            given[name] = value
    for name in ("input_tokens", "output_tokens"):
        if (text := getattr(arguments, name)) is not None:
            given[name] = Lengths.parse(text, "--" + name.replace("_", "-"))
    return RequestPlan(
        spec=dataclasses.replace(spec, **given),
        dataset=arguments.dataset,
        dataset_output=given.get("output_tokens"),
        trace=arguments.trace,
        trace_limit=arguments.trace_limit,
        trace_speed=arguments.trace_speed or 1.0,
        prompt=arguments.prompt,
        max_model_len=arguments.max_model_len,
    )


async def _bench(arguments: argparse.Namespace, loads: list[Load], plan: RequestPlan, slo: SLO | None) -> Report:
    import servd
    from servd.benchmark import data_hash, find_server
    from servd.benchmark.display import live_display, run_block
    from servd.benchmark.plan import plan_requests
    from servd.benchmark.report import Report, command_line, this_commit, this_machine
    from servd.benchmark.server import check_options
    from servd.benchmark.session import Session

    options = _read_options(arguments)
    server = await find_server(arguments.url, arguments.model, options)
    planned = await plan_requests(plan, server, options)
    requests = planned.requests
    sent = await check_options(server, requests[0], options)
    if sent != options:
        sys.stderr.write("the server refuses ignore_eos: answers end where the model ends them\n")
    if planned.num_clipped:
        sys.stderr.write(f"{planned.num_clipped} of {len(requests)} requests were cut to the server's context\n")
    session = Session(server, requests, sent, live_display, arguments.seed, arguments.salt)
    await session.warm_up(arguments.warmup)
    report = Report(
        command=command_line(sys.argv[1:]), servd_version=servd.__version__, commit=this_commit(),
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=this_machine(), url=server.url, model=server.model, server=server.software,
        endpoint=arguments.endpoint, workload=planned.description,
        num_requests=len(requests), num_clipped=planned.num_clipped,
        seed=arguments.seed, data_sha256=data_hash(requests), slo=slo, summaries=[], runs=[],
    )  # fmt: skip
    async for run in session.run(loads, arguments.repeat):
        report.runs.append(run)
        report.summaries.append(run.summary(slo))
        sys.stdout.write(run_block(run, report.summaries[-1], slo) + "\n")
        sys.stdout.flush()
    return report


def _write(report: Report, json_path: Path | None, plot_path: Path | None) -> None:
    """Files and the last words. Raises RequestFailedError if requests failed: a figure of the others is no figure."""
    from servd.benchmark.display import print_overview
    from servd.benchmark.plot import plot_runs
    from servd.benchmark.report import write_report

    if json_path is not None:
        write_report(report, json_path)
    if plot_path is not None:
        plot_runs(report.runs, report.summaries, f"{report.model} at {report.url}: {report.workload}", plot_path)
    if len(report.runs) > 1:
        sys.stdout.flush()
        print_overview(report.runs, report.summaries)
    failures = [row for run in report.runs for row in run.rows if row.error is not None]
    if failures:
        total = sum(len(run.rows) for run in report.runs)
        first = failures[0]
        raise RequestFailedError(f"{len(failures)} of {total} requests failed, first {first.error}: {first.message}")


def _compare(a: Path, b: Path) -> int:
    from servd.benchmark.compare import compare_reports
    from servd.benchmark.display import print_comparison
    from servd.benchmark.report import read_report

    before, after = read_report(a), read_report(b)
    for name in ("model", "endpoint", "data_sha256", "machine"):
        values = getattr(before, name), getattr(after, name)
        if values[0] != values[1]:
            sys.stdout.write(f"note: {name} differs: {values[0]} and {values[1]}\n")
    differences = compare_reports(before, after)
    if not differences:
        raise ConfigError(f"{a} and {b} have no load in common")
    for name, report in (("A", before), ("B", after)):
        loads = dict.fromkeys(run.load for run in report.runs)
        missing = [load for load in loads if load not in {difference.load for difference in differences}]
        if missing:
            sys.stdout.write(f"note: only {name} has {', '.join(missing)}\n")
    print_comparison(differences)
    return 0
