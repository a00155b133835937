#!/usr/bin/env python3
"""Owns the check of `servd bench` itself: does it measure the known times of a paced server, and what does aiperf say?
That server answers after a set time and sends tokens at a set pace, so that the machine's moods stay out of it."""

import argparse
import asyncio
import heapq
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.queues import Queue
from pathlib import Path

from aiohttp import web

from servd.benchmark import BenchRequest, Corpus, WorkloadSpec, make_workload
from servd.benchmark.report import read_report
from servd.eval.text import python_help

MODEL = "paced"
TTFT_SECONDS = 0.25
GAP_SECONDS = 0.03
ALLOWED = 0.05
Figures = tuple[float, float, float]  # output tok/s, median TTFT ms, median TPOT ms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", default="8,32", metavar="N,N,...", help="default: 8,32")
    parser.add_argument("--num-requests", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--aiperf", type=Path, metavar="FILE", help="the aiperf program, in an environment of its own")
    parser.add_argument(
        "--tokenizer", default="builtin", metavar="FOLDER", help="for aiperf, which wants one; default: builtin"
    )
    arguments = parser.parse_args()
    requests = make_workload(Corpus.of_text(python_help()), WorkloadSpec(arguments.num_requests))
    # Not forked: the server must not inherit the state of an event loop, or threads.
    context = multiprocessing.get_context("spawn")
    ports: Queue[int] = context.Queue()
    server = context.Process(target=serve, args=(ports,), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{ports.get(timeout=60)}"
        with tempfile.TemporaryDirectory() as folder:
            levels = [int(level) for level in arguments.concurrency.split(",")]
            aiperf = (arguments.aiperf, arguments.tokenizer) if arguments.aiperf else None
            return max(_compare(url, requests, level, aiperf, Path(folder)) for level in levels)
    finally:
        server.terminate()
        server.join()


def _compare(
    url: str, requests: Sequence[BenchRequest], concurrency: int, aiperf: tuple[Path, str] | None, folder: Path
) -> int:
    """Print a table; 1 if `servd bench` is further from the truth, or from aiperf, than allowed."""
    truth = expected(requests, concurrency)
    rows = {"servd bench": by_servd(url, requests, concurrency, folder)}
    if aiperf is not None:
        rows["aiperf"] = by_aiperf(*aiperf, url, requests, concurrency, folder)
    sys.stdout.write(f"concurrency {concurrency:<6d}{'output tok/s':>16s}{'TTFT p50 ms':>20s}{'TPOT p50 ms':>20s}\n")
    sys.stdout.write(f"{'set':18s}" + "".join(f"{value:11.2f}{'':9s}" for value in truth) + "\n")
    for name, figures in rows.items():
        cells = (f"{value:11.2f} {value / true - 1:+7.1%} " for value, true in zip(figures, truth, strict=True))
        sys.stdout.write(f"{name:18s}" + "".join(cells) + "\n")
    sys.stdout.flush()
    ours = rows.pop("servd bench")
    pairs = [pair for others in (truth, *rows.values()) for pair in zip(ours, others, strict=True)]
    return int(any(abs(figure / other - 1) > ALLOWED for figure, other in pairs))


def expected(requests: Sequence[BenchRequest], concurrency: int) -> Figures:
    """What a client without any cost would see in a closed loop."""
    free_at = [0.0] * concurrency
    for request in requests:
        seconds = TTFT_SECONDS + (request.output_tokens - 1) * GAP_SECONDS
        heapq.heapreplace(free_at, free_at[0] + seconds)
    output_tokens = sum(request.output_tokens for request in requests)
    return output_tokens / max(free_at), TTFT_SECONDS * 1e3, GAP_SECONDS * 1e3


def by_servd(url: str, requests: Sequence[BenchRequest], concurrency: int, folder: Path) -> Figures:
    """Measured by `servd bench`, in a process of its own."""
    rows = [{"prompt": request.prompt, "output_tokens": request.output_tokens} for request in requests]
    _write_lines(folder / "servd.jsonl", rows)
    command = [sys.executable, "-m", "servd.cli", "bench", "--url", url, "--prompt", "text"]
    command += ["--dataset", str(folder / "servd.jsonl"), "--num-requests", str(len(requests))]
    command += ["--concurrency", str(concurrency), "--json", str(folder / "servd.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (summary,) = read_report(folder / "servd.json").summaries
    assert summary.ttft_ms.p50 is not None and summary.tpot_ms.p50 is not None
    return summary.output_tokens_per_s, summary.ttft_ms.p50, summary.tpot_ms.p50


def by_aiperf(
    program: Path, tokenizer: str, url: str, requests: Sequence[BenchRequest], concurrency: int, folder: Path
) -> Figures:
    """Measured by aiperf, with one worker: it is there to be compared, not to fill the machine."""
    rows = [{"text_input": request.prompt, "output_length": request.output_tokens} for request in requests]
    _write_lines(folder / "aiperf.jsonl", rows)
    command = [str(program), "profile", "--model", MODEL, "--url", url, "--endpoint-type", "completions"]
    command += ["--streaming", "--use-server-token-count", "--tokenizer", tokenizer, "--use-legacy-max-tokens"]
    command += ["--input-file", str(folder / "aiperf.jsonl"), "--custom-dataset-type", "mooncake_trace"]
    # No warm-up: it would take requests off the row, and another order ends with another tail.
    command += ["--dataset-sampling-strategy", "sequential"]
    command += ["--concurrency", str(concurrency), "--request-count", str(len(requests))]
    command += ["--workers-max", "1", "--record-processors", "1", "--no-server-metrics", "--no-gpu-telemetry"]
    command += ["--ui", "none", "--artifact-dir", str(folder / "aiperf")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    figures = json.loads((folder / "aiperf" / "profile_export_aiperf.json").read_text())
    return (
        figures["output_token_throughput"]["avg"],
        figures["time_to_first_token"]["p50"],
        figures["inter_token_latency"]["p50"],  # aiperf's is a mean a request: what is called TPOT here
    )


def _write_lines(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def serve(ports: "Queue[int]") -> None:
    """The server, until it is terminated; its port goes into the queue."""
    asyncio.run(_serve(ports))


async def _serve(ports: "Queue[int]") -> None:
    app = web.Application()
    app.add_routes([web.get("/v1/models", _models), web.post("/v1/completions", _complete)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    ports.put(runner.addresses[0][1])
    await asyncio.Event().wait()


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})


async def _complete(request: web.Request) -> web.StreamResponse:
    """Tokens at their times, counted from the request's arrival: one that is late does not delay the next."""
    loop = asyncio.get_running_loop()
    first_at = loop.time() + TTFT_SECONDS
    body = await request.json()
    count = body["max_tokens"]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for i in range(count):
        await asyncio.sleep(first_at + i * GAP_SECONDS - loop.time())
        reason = "length" if i == count - 1 else None
        await response.write(_event({"choices": [{"index": 0, "text": "a ", "finish_reason": reason}]}))
    usage = {"prompt_tokens": len(body["prompt"]) // 4, "completion_tokens": count}
    usage["total_tokens"] = sum(usage.values())
    await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
    return response


def _event(value: dict[str, object]) -> bytes:
    shared = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": MODEL}
    return b"data: " + json.dumps(shared | value).encode() + b"\n\n"


if __name__ == "__main__":
    sys.exit(main())
