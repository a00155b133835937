"""A comparison as a picture: throughput and time to the first token, a bar a peer.

Knows nothing of measuring. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers.results import Comparison, Row, p50, p99

SIZE = (11, 7)  # inches


def draw(comparison: Comparison, path: Path) -> None:
    """Write .png, .svg or .pdf."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for row in comparison.rows if row.rounds]
    loads = list(dict.fromkeys(load for row in rows for load in row.loads()))
    figure, (rates, waits) = pyplot.subplots(2, 1, figsize=SIZE, layout="constrained")
    _bars(rates, rows, loads, lambda row, load: row.of_load(load, lambda summary: summary.output_tokens_per_s))
    rates.set_ylabel("output tok/s")
    _bars(waits, rows, loads, lambda row, load: row.of_load(load, lambda summary: p99(summary.ttft_ms)), alpha=0.35)
    _bars(waits, rows, loads, lambda row, load: row.of_load(load, lambda summary: p50(summary.ttft_ms)))
    waits.set(ylabel="time to first token, ms (pale: p99)", yscale="log")
    rates.legend([f"{row.name} ({row.weights})" for row in rows], fontsize="small")
    rates.set_title(f"{comparison.machine}, {comparison.started_at[:10]}", fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)


def _bars(
    axes: Any, rows: list[Row], loads: list[str], figure: Callable[[Row, str], float], *, alpha: float = 1.0
) -> None:
    """A group a load, a bar a row that has it; a row keeps its colour."""
    width = 0.85 / max(len(rows), 1)
    for place, row in enumerate(rows):
        shared = [(at, load) for at, load in enumerate(loads) if load in row.loads()]
        positions = [at + (place - (len(rows) - 1) / 2) * width for at, _ in shared]
        heights = [figure(row, load) for _, load in shared]
        axes.bar(positions, heights, width, color=f"C{place}", alpha=alpha)
    axes.set_xticks(range(len(loads)), loads)
    axes.grid(alpha=0.3, axis="y")
