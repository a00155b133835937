"""From what was asked for to the requests of a benchmark, in this server's tokens and cut to its context.

Knows nothing of flags; sizes and kinds were checked before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from servd.benchmark.client import RequestOptions
from servd.benchmark.dataset import dataset_requests, read_dataset
from servd.benchmark.requests import BenchRequest, clip_to_context
from servd.benchmark.server import Server, read_corpus, tokenize
from servd.benchmark.trace import read_trace, trace_requests
from servd.benchmark.workload import Lengths, WorkloadSpec, make_workload
from servd.errors import ConfigError
from servd.eval.text import python_help

CHAT_TEMPLATE_TOKENS = 64  # of the context, for what a template adds to a message
TEXT_SHARE = 0.8  # of the context that text may fill: its length in tokens is an estimate


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """Where requests come from: a trace, a file, or `spec`."""

    spec: WorkloadSpec
    dataset: Path | None = None
    dataset_output: Lengths | None = None  # instead of the file's answers
    trace: Path | None = None
    trace_limit: int | None = None
    trace_speed: float = 1.0
    prompt: str = "auto"  # "ids", "text", or ids where the server can make them
    max_model_len: int | None = None  # instead of what the server says


@dataclass(frozen=True, slots=True)
class PlannedRequests:
    """The requests, and what a reader of results must know of them."""

    requests: list[BenchRequest]
    num_clipped: int
    description: str


async def plan_requests(plan: RequestPlan, server: Server, options: RequestOptions) -> PlannedRequests:
    """Make or read them. Raises ConfigError for a file that is wrong, RequestFailedError if the tokenizer fails."""
    can_send_ids = options.endpoint == "completions" and server.tokenizes
    as_ids = plan.prompt == "ids" or (plan.prompt == "auto" and can_send_ids)
    limit = _limit(plan.max_model_len or server.max_model_len, options.endpoint, as_ids)
    kind = "token ids" if as_ids else "text"
    seed = plan.spec.seed
    if plan.dataset is not None:
        requests = await dataset_requests(
            read_dataset(plan.dataset), plan.spec.num_requests, seed=seed, output_tokens=plan.dataset_output,
            as_ids=as_ids, tokenize=(lambda texts: tokenize(server, texts, options)) if server.tokenizes else None,
        )  # fmt: skip
        num_texts = sum(isinstance(request.prompt, str) for request in requests)
        if (options.endpoint == "chat" or plan.prompt == "text") and num_texts < len(requests):
            raise ConfigError(
                f"--dataset {plan.dataset} holds token ids; allowed with --endpoint chat and --prompt text: text"
            )
        if plan.prompt == "ids" and num_texts:
            raise ConfigError(f"--prompt ids: --dataset {plan.dataset} holds text and {server.url} has no /tokenize")
        return _clipped(requests, limit, f"{plan.dataset.name}, {'text' if num_texts else 'token ids'}")
    arrivals = read_trace(plan.trace, plan.trace_limit) if plan.trace is not None else None
    corpus = await read_corpus(server, python_help(), options, as_ids=as_ids)
    if plan.trace is not None and arrivals is not None:
        requests, num_clipped = trace_requests(corpus, arrivals, limit=limit, speed=plan.trace_speed, seed=seed)
        return PlannedRequests(requests, num_clipped, f"{plan.trace.name} at {plan.trace_speed:g}x, {kind}")
    return _clipped(make_workload(corpus, plan.spec), limit, f"{plan.spec.describe()}, {kind} of Python's help")


def _limit(context: int | None, endpoint: str, as_ids: bool) -> int | None:
    """Tokens that a prompt and its answer may have together."""
    if context is None:
        return None
    if not as_ids:
        context = int(context * TEXT_SHARE)
    return max(context - CHAT_TEMPLATE_TOKENS, 2) if endpoint == "chat" else context


def _clipped(requests: list[BenchRequest], limit: int | None, description: str) -> PlannedRequests:
    if limit is None:
        return PlannedRequests(requests, 0, description)
    return PlannedRequests(*clip_to_context(requests, limit), description)
