"""Load on an OpenAI-compatible endpoint, and what came of it: requests, clocks, results, comparison, plots.

Knows nothing of engines; `servd bench` is its command line. In short:

    requests = make_workload(Corpus.of_text(python_help()), WorkloadSpec(num_requests=64))
    result = await run_closed_loop("http://127.0.0.1:8000", "my-model", requests, 8)
    result.summary().output_tokens_per_s
"""

from __future__ import annotations

from servd.benchmark.client import RequestOptions
from servd.benchmark.corpus import Corpus
from servd.benchmark.load import run_closed_loop, run_open_loop
from servd.benchmark.requests import BenchRequest, data_hash, freshen
from servd.benchmark.results import SLO, Percentiles, RequestRow, RunResult, Summary
from servd.benchmark.server import Server, find_server, read_corpus
from servd.benchmark.workload import Lengths, WorkloadSpec, make_workload

__all__ = [
    "SLO",
    "BenchRequest",
    "Corpus",
    "Lengths",
    "Percentiles",
    "RequestOptions",
    "RequestRow",
    "RunResult",
    "Server",
    "Summary",
    "WorkloadSpec",
    "data_hash",
    "find_server",
    "freshen",
    "make_workload",
    "read_corpus",
    "run_closed_loop",
    "run_open_loop",
]
