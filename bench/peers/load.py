"""The requests that every peer gets, and one load of them.

Knows nothing of peers. The client is servd's own (servd.benchmark).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import msgspec
import uvloop

from servd.benchmark import BenchRequest, Corpus, RequestOptions, Summary, WorkloadSpec, make_workload, run_closed_loop
from servd.benchmark.server import CORPUS_CHARS
from servd.engine.tokenizer import Tokenizer
from servd.eval.text import python_help

# llama.cpp closes connections behind its answers without a word: a request on a kept one may find it closed.
NO_REUSE = {"Connection": "close"}
WARMUP_REQUESTS, WARMUP_CONCURRENCY = 8, 4


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests of one set, so many of them at a time."""

    name: str
    workload: str  # a key of `make_workloads`
    concurrency: int
    num_requests: int | None = None  # the first of the set; None: all


# One request at a time is slow and varies little: fewer of them will do.
LOADS = (
    Load("c=1", "chat", 1, 24),
    Load("c=8", "chat", 8),
    Load("c=32", "chat", 32),
    Load("prefix c=8", "prefix", 8),
)


class _NewConnections(RequestOptions):
    """A connection a request, for every peer."""

    def session(self) -> aiohttp.ClientSession:
        """The usual one, with that header."""
        session = super().session()
        session.headers.update(NO_REUSE)
        return session


def make_workloads(tokenizer: Tokenizer, seed: int) -> dict[str, list[BenchRequest]]:
    """`chat`: 64 requests of mixed lengths; `prefix`: 32 that share 512 tokens. Token ids of a text Python has."""
    corpus = Corpus.of_ids(tokenizer.encode(python_help()[:CORPUS_CHARS], add_special_tokens=False))
    return {
        "chat": make_workload(corpus, WorkloadSpec(seed=seed)),
        "prefix": make_workload(corpus, WorkloadSpec.shared_prefix(seed=seed)),
    }


def run_load(url: str, model: str, requests: Sequence[BenchRequest], concurrency: int) -> Summary:
    """Send them all, with first tokens that no cache has seen, and sum up what came of it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        options = _NewConnections()
        return runner.run(run_closed_loop(url, model, requests, concurrency, options=options)).summary()


def ask_all(
    url: str, model: str, prompts: Sequence[Sequence[int]], max_tokens: int, concurrency: int
) -> list[str]:
    """The greedy answers as text. Raises aiohttp.ClientError if the server does not answer one."""

    async def run() -> list[str]:
        free = asyncio.Semaphore(concurrency)
        async with aiohttp.ClientSession(headers=NO_REUSE, raise_for_status=True) as session:

            async def ask(prompt: Sequence[int]) -> str:
                body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
                async with free, session.post(f"{url}/v1/completions", json=body) as response:
                    return _text(await response.read())

            return await asyncio.gather(*map(ask, prompts))

    return asyncio.run(run())


def _text(stream: bytes) -> str:
    """The text of all events."""
    events = (line[5:].strip() for line in stream.split(b"\n") if line.startswith(b"data:"))
    chunks = [msgspec.json.decode(event) for event in events if event != b"[DONE]"]
    return "".join(choice.get("text") or "" for chunk in chunks for choice in chunk.get("choices") or [])
