"""Two reports side by side: each figure's difference, how sure it is, and whether it means anything.

Knows nothing of how reports are made or shown. Intervals are of the ratio B / A, at 95 %:

- both sides repeated the load: from how much its figure varies from one repetition to the next. Each side's mean of
  logarithms is drawn from Student's t around what was seen, so that three repetitions give a wide interval and ten a
  narrow one;
- else: bootstrap over requests, in pairs where both sides ran the same ones. It knows nothing of what differs between
  two runs of the same thing, so it is the optimistic one; throughput is one number a run and gets no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from servd.benchmark.report import Report
from servd.benchmark.results import RequestRow, RunResult, Summary

NUM_DRAWS = 10_000
NUM_RESAMPLES = 1_000
TAILS = (2.5, 97.5)

RATES: dict[str, Callable[[Summary], float]] = {
    "output tok/s": lambda summary: summary.output_tokens_per_s,
    "total tok/s": lambda summary: summary.total_tokens_per_s,
    "requests/s": lambda summary: summary.requests_per_s,
}
TIMES: dict[str, Callable[[RequestRow], Sequence[float]]] = {
    "TTFT": lambda row: () if row.ttft_ms is None else (row.ttft_ms,),
    "TPOT": lambda row: () if row.tpot_ms is None else (row.tpot_ms,),
    "ITL": lambda row: row.itl_ms,
    "end to end": lambda row: (row.e2e_ms,),
}
STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "p50": lambda values: float(np.percentile(values, 50)),
    "p90": lambda values: float(np.percentile(values, 90)),
    "p99": lambda values: float(np.percentile(values, 99)),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of both reports. Changes are shares: 0.1 is 10 % more in B."""

    load: str
    metric: str  # with its unit
    a: float
    b: float
    change: float
    low: float | None  # of the 95 % interval of `change`; None if there is none
    high: float | None
    higher_is_better: bool
    from_repetitions: bool  # the interval is; else it rests on single runs

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out no difference at all."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @property
    def verdict(self) -> str:
        """In words."""
        if self.low is None:
            return "unknown: repeat both (--repeat 3 or more)"
        if not self.is_significant:
            return "not significant"
        verdict = "better" if (self.change > 0) == self.higher_is_better else "worse"
        return verdict if self.from_repetitions else f"{verdict}, if the machine did not drift"


def compare_reports(a: Report, b: Report, seed: int = 0) -> list[Difference]:
    """Every figure of every load that both reports hold, in A's order. Figures that one side lacks are left out."""
    same_work = a.data_sha256 == b.data_sha256
    differences: list[Difference] = []
    for load in dict.fromkeys(run.load for run in a.runs):
        runs_a = [run for run in a.runs if run.load == load]
        runs_b = [run for run in b.runs if run.load == load]
        if runs_b:
            differences += _compare_load(load, runs_a, runs_b, same_work, np.random.default_rng(seed))
    return differences


def _compare_load(
    load: str, a: list[RunResult], b: list[RunResult], same_work: bool, rng: np.random.Generator
) -> list[Difference]:
    repeated = len(a) > 1 and len(b) > 1
    summaries = [run.summary() for run in a], [run.summary() for run in b]
    found: list[Difference | None] = []
    for name, rate in RATES.items():
        values = [rate(summary) for summary in summaries[0]], [rate(summary) for summary in summaries[1]]
        draws = _repetition_draws(*values, rng) if repeated else None
        found.append(_difference(load, name, *values, draws, True, repeated))
    for time_name, times in TIMES.items():
        for statistic_name, statistic in STATISTICS.items():
            values = _of_runs(a, times, statistic), _of_runs(b, times, statistic)
            if not (values[0] and values[1]):
                continue
            if repeated:
                draws = _repetition_draws(*values, rng)
            else:
                draws = _request_draws(a, b, times, statistic, same_work, rng)
            found.append(_difference(load, f"{time_name} {statistic_name} ms", *values, draws, False, repeated))
    return [difference for difference in found if difference is not None]


def _of_runs(
    runs: list[RunResult],
    times: Callable[[RequestRow], Sequence[float]],
    statistic: Callable[[np.ndarray], float],
) -> list[float]:
    """The figure of each run that has one."""
    pooled = (np.array([t for row in run.rows if row.error is None for t in times(row)]) for run in runs)
    return [statistic(values) for values in pooled if len(values)]


def _difference(
    load: str,
    metric: str,
    a: list[float],
    b: list[float],
    log_ratios: np.ndarray | None,
    higher_is_better: bool,
    repeated: bool,
) -> Difference | None:
    """None where a side has nothing: a ratio to zero says nothing."""
    if min(*a, *b) <= 0:
        return None
    mean_a, mean_b = float(np.exp(np.mean(np.log(a)))), float(np.exp(np.mean(np.log(b))))
    low = high = None
    if log_ratios is not None:
        low, high = (float(np.expm1(edge)) for edge in np.percentile(log_ratios, TAILS))
    return Difference(load, metric, mean_a, mean_b, mean_b / mean_a - 1, low, high, higher_is_better, repeated)


def _repetition_draws(a: list[float], b: list[float], rng: np.random.Generator) -> np.ndarray | None:
    """Draws of log(B / A) from the spread between repetitions."""
    if min(len(a), len(b)) < 2 or min(*a, *b) <= 0:
        return None
    draws = []
    for values in (a, b):
        logs = np.log(values)
        error = np.std(logs, ddof=1) / np.sqrt(len(logs))
        draws.append(np.mean(logs) + error * rng.standard_t(len(logs) - 1, NUM_DRAWS))
    return np.asarray(draws[1] - draws[0])


def _request_draws(
    a: list[RunResult],
    b: list[RunResult],
    times: Callable[[RequestRow], Sequence[float]],
    statistic: Callable[[np.ndarray], float],
    same_work: bool,
    rng: np.random.Generator,
) -> np.ndarray | None:
    """Draws of log(B / A) from requests drawn again with replacement, whole with all their gaps."""
    side_a, side_b = _by_request(a, times), _by_request(b, times)
    if same_work:
        ids = [i for i in side_a if i in side_b]
        groups = [side_a[i] for i in ids], [side_b[i] for i in ids]
    else:
        groups = list(side_a.values()), list(side_b.values())
    if min(map(len, groups)) < 2:
        return None
    draws = np.empty(NUM_RESAMPLES)
    for k in range(NUM_RESAMPLES):
        picks = [rng.integers(0, len(group), len(group)) for group in groups]
        if same_work:
            picks[1] = picks[0]
        values = [np.concatenate([group[i] for i in pick]) for group, pick in zip(groups, picks, strict=True)]
        figures = [statistic(v) for v in values]
        draws[k] = np.log(figures[1] / figures[0]) if min(figures) > 0 else 0.0
    return draws


def _by_request(
    runs: list[RunResult], times: Callable[[RequestRow], Sequence[float]]
) -> dict[str, np.ndarray]:
    """Each request's values, of all repetitions, without requests that have none."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for row in run.rows:
            if row.error is None:
                found.setdefault(row.id, []).extend(times(row))
    return {i: np.array(values) for i, values in found.items() if values}
