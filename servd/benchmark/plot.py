"""Pictures of a benchmark: throughput against latency, and what went on when. Needs matplotlib.

Knows nothing of measuring.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from servd.benchmark.results import RequestRow, RunResult, Summary
from servd.errors import ConfigError

Curve = tuple[str, Callable[[Summary], float | None]]
BINS = 60  # of the throughput's timeline
TITLE_WIDTH = 90


def plot_runs(runs: Sequence[RunResult], summaries: Sequence[Summary], title: str, path: Path) -> None:
    """The timeline of the last run, below the curves of all loads if there are several.

    Raises ConfigError if it cannot be written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    several = len({run.load for run in runs}) > 1
    figure, axes = pyplot.subplots(2 + several, 1, figsize=(8, 7 + 3 * several), layout="constrained", squeeze=False)
    figure.suptitle(textwrap.fill(title, TITLE_WIDTH), fontsize="medium")
    panels = list(axes[:, 0])
    if several:
        _draw_tradeoff(panels.pop(0), runs, summaries)
    _draw_requests(panels[0], runs[-1])
    _draw_throughput(panels[1], runs[-1])
    panels[0].sharex(panels[1])
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)


def _draw_tradeoff(axes: Any, runs: Sequence[RunResult], summaries: Sequence[Summary]) -> None:
    """A point a load, medians over repetitions, joined by load."""
    curves: list[Curve] = [
        ("TTFT p50", lambda summary: summary.ttft_ms.p50),
        ("TTFT p99", lambda summary: summary.ttft_ms.p99),
        ("TPOT p50", lambda summary: summary.tpot_ms.p50),
    ]
    loads = list(dict.fromkeys(run.load for run in runs))
    by_load = {load: [s for r, s in zip(runs, summaries, strict=True) if r.load == load] for load in loads}
    for name, latency in curves:
        points = []
        for load in loads:
            found = [ms for summary in by_load[load] if (ms := latency(summary)) is not None]
            if found:
                throughput = statistics.median(summary.output_tokens_per_s for summary in by_load[load])
                points.append((throughput, statistics.median(found), load))
        axes.plot([p[0] for p in points], [p[1] for p in points], "o-", label=name)
        if name == curves[0][0]:
            for x, y, load in points:
                axes.annotate(load, (x, y), xytext=(4, 4), textcoords="offset points", fontsize="small")
    axes.set(xlabel="output tok/s", ylabel="ms", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_requests(axes: Any, run: RunResult) -> None:
    """A bar a request: waiting for its first token, then answering; failures in red."""
    for i, row in enumerate(run.rows):
        begin, end = row.start_s, row.start_s + row.e2e_ms / 1e3
        first = begin + (row.ttft_ms or row.e2e_ms) / 1e3
        axes.barh(i, first - begin, left=begin, height=1, color="tab:red" if row.error else "tab:orange")
        axes.barh(i, end - first, left=first, height=1, color="tab:red" if row.error else "tab:blue")
    axes.set(xlabel=f"s, {run.load}: orange waits for its first token, blue answers", ylabel="request")


def _draw_throughput(axes: Any, run: RunResult) -> None:
    """Pieces of text a second over time."""
    times = np.concatenate([[], *map(_piece_times, run.rows)])
    end = max(run.wall_s, 1e-3)
    counts, edges = np.histogram(times, bins=BINS, range=(0, end))
    axes.stairs(counts * BINS / end, edges, fill=True, alpha=0.7)
    axes.set(xlabel=f"s, {run.load}", ylabel="pieces of text / s", xlim=(0, end))
    axes.grid(alpha=0.3)


def _piece_times(row: RequestRow) -> np.ndarray:
    """Seconds since the run's start."""
    if row.ttft_ms is None:
        return np.empty(0)
    return row.start_s + np.cumsum([row.ttft_ms, *row.itl_ms]) / 1e3
