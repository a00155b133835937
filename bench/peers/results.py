"""What a comparison gave: a row a peer, of rounds of loads; and the medians that tables are made of.

Knows nothing of how any of it was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import msgspec

from servd.benchmark import Percentiles, Summary
from servd.errors import ConfigError

DISTURBED = 0.05  # of the machine, taken by others: above it a load's figures are not worth much


class LoadResult(msgspec.Struct, kw_only=True):
    """One load of one round."""

    load: str
    summary: Summary
    others_share: float  # of the machine's cores that went to processes outside the comparison


class Round(msgspec.Struct, kw_only=True):
    """One start of a peer and all loads on it."""

    start_s: float  # until it takes requests
    first_token_s: float  # until a first request was answered, from the process's start
    memory_at_start: int  # bytes resident then
    memory: int  # the most that was found after any load
    loads: list[LoadResult]


class Quality(msgspec.Struct, kw_only=True):
    """What the weights and the arithmetic leave of the model."""

    num_right: int
    num_questions: int
    perplexity_change: float | None = None  # share, against float32; None if it was not measured
    is_faithful: bool | None = None


class Row(msgspec.Struct, kw_only=True):
    """One peer."""

    name: str
    weights: str
    version: str
    command: list[str]
    env: dict[str, str]
    notes: str
    kv_bytes_at_start: int
    rounds: list[Round] = []
    quality: Quality | None = None
    error: str | None = None  # why it has no figures

    def median(self, figure: Callable[[Round], float]) -> float:
        """Over rounds."""
        return statistics.median(map(figure, self.rounds))

    def of_load(self, load: str, figure: Callable[[Summary], float]) -> float:
        """The median over rounds of a figure of this load."""
        return statistics.median(figure(result.summary) for result in self.results(load))

    def results(self, load: str) -> list[LoadResult]:
        """Of this load, a round each."""
        return [result for one in self.rounds for result in one.loads if result.load == load]

    def loads(self) -> list[str]:
        """Names of its loads, in order."""
        return list(dict.fromkeys(result.load for one in self.rounds for result in one.loads))

    @property
    def first_token_s(self) -> float:
        """From the start of the process to the end of its first answer."""
        return self.median(lambda one: one.first_token_s)

    @property
    def memory_beyond_kv(self) -> float:
        """Bytes resident once it answers, without the memory for keys and values."""
        return self.median(lambda one: one.memory_at_start) - self.kv_bytes_at_start


class Comparison(msgspec.Struct, kw_only=True):
    """All of one run."""

    command: str
    machine: str
    commit: str | None
    started_at: str
    model: str
    workloads: dict[str, str]  # name → SHA-256 of its requests
    seed: int
    rows: list[Row]

    def take_over(self, earlier: Comparison) -> None:
        """The earlier one's rounds, and its rows that are not among these. Raises ConfigError if the two differ."""
        for name in ("machine", "commit", "model", "seed", "workloads"):
            old, new = getattr(earlier, name), getattr(self, name)
            if old != new:
                raise ConfigError(f"--resume: {name} was {old!r} and is {new!r}; allowed: the same")
        self.started_at = earlier.started_at
        rows = {row.name: row for row in self.rows}
        for old_row in earlier.rows:
            row = rows.setdefault(old_row.name, old_row)
            row.rounds, row.quality = old_row.rounds, old_row.quality
        self.rows = sorted(rows.values(), key=lambda row: row.name)

    def row(self, name: str) -> Row | None:
        """The peer's row, if it has figures."""
        return next((row for row in self.rows if row.name == name and row.rounds), None)


def p50(times: Percentiles) -> float:
    """In ms; NaN where nothing was measured."""
    return times.p50 if times.p50 is not None else float("nan")


def p99(times: Percentiles) -> float:
    """In ms; NaN where nothing was measured."""
    return times.p99 if times.p99 is not None else float("nan")
