"""How results look in a terminal: a live line while a run goes on, a block a run, a table at the end.

Knows nothing of measuring; a run's state comes from its LoadWatch.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from servd.benchmark.client import LoadWatch
from servd.benchmark.compare import Difference
from servd.benchmark.results import SLO, Percentiles, RunResult, Summary

REFRESH_SECONDS = 0.5  # drawing costs a few ms of a core that the server may share
PLAIN_SECONDS = 10.0  # between two lines where stderr is no terminal
WIDTH = 120


@asynccontextmanager
async def live_display(what: str, watch: LoadWatch) -> AsyncIterator[None]:
    """Show the watch on stderr while the block runs."""
    task = asyncio.create_task(_bar(what, watch) if sys.stderr.isatty() else _plain_lines(what, watch))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _bar(what: str, watch: LoadWatch) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
    rate = _Rate()
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        bar = progress.add_task(what, total=watch.total, state="")
        while True:
            progress.update(bar, completed=watch.done, total=watch.total or 1, state=_state(watch, rate.now(watch)))
            progress.refresh()
            await asyncio.sleep(REFRESH_SECONDS)


async def _plain_lines(what: str, watch: LoadWatch) -> None:
    rate = _Rate()
    while True:
        await asyncio.sleep(PLAIN_SECONDS)
        sys.stderr.write(f"{what}: {_state(watch, rate.now(watch))}\n")
        sys.stderr.flush()


class _Rate:
    """Pieces a second since it was last asked."""

    def __init__(self) -> None:
        self._at = time.perf_counter()
        self._pieces = 0

    def now(self, watch: LoadWatch) -> float:
        at, pieces = time.perf_counter(), watch.pieces
        rate = (pieces - self._pieces) / max(at - self._at, 1e-3)
        self._at, self._pieces = at, pieces
        return rate


def _state(watch: LoadWatch, rate: float) -> str:
    parts = [f"{watch.done}/{watch.total}", f"{watch.running} running"]
    if watch.failed:
        parts.append(f"{watch.failed} failed")
    parts.append(f"{rate:.0f} tok/s")
    if watch.ttfts_ms:
        parts.append(f"TTFT p50 {statistics.median(watch.ttfts_ms):.0f} ms")
    return " · ".join(parts)


def run_block(run: RunResult, summary: Summary, slo: SLO | None) -> str:
    """One run in a few lines."""
    head = f"{run.load}"
    if run.repetition:
        head += f", repetition {run.repetition + 1}"
    head += f": {summary.completed} requests in {summary.wall_s:.1f} s"
    if summary.failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary.errors.items())
        head += f", {summary.failed} failed ({kinds})"
    rates = [
        f"{summary.output_tokens_per_s:.1f} output tok/s",
        f"{summary.total_tokens_per_s:.1f} total tok/s",
        f"{summary.requests_per_s:.2f} requests/s",
    ]
    if summary.goodput_per_s is not None and summary.good_share is not None:
        rates.append(f"goodput {summary.goodput_per_s:.2f}/s ({summary.good_share:.0%} with {slo})")
    lines = [head, "  " + " · ".join(rates), f"  {'ms':10s}{'mean':>10s}{'p50':>10s}{'p90':>10s}{'p99':>10s}"]
    for name, times in (
        ("TTFT", summary.ttft_ms), ("TPOT", summary.tpot_ms), ("ITL", summary.itl_ms), ("end to end", summary.e2e_ms),
    ):  # fmt: skip
        if times.mean is not None:
            lines.append(_times_line(name, times))
    lines += [f"  note: {note}" for note in _notes(run, summary)]
    return "\n".join(lines) + "\n"


def _times_line(name: str, times: Percentiles) -> str:
    return f"  {name:10s}" + "".join(f"{value:10.1f}" for value in (times.mean, times.p50, times.p90, times.p99))


def _notes(run: RunResult, summary: Summary) -> list[str]:
    """What a reader must know before believing the figures."""
    notes: list[str] = []
    share = run.client_cpu_s / run.wall_s if run.wall_s else 0.0
    if share > 0.1:
        notes.append(f"this client used {share:.0%} of a core")
    if summary.short:
        notes.append(f"{summary.short} answers are not as long as asked")
    if summary.without_usage:
        notes.append(f"{summary.without_usage} answers came without usage: their tokens are counted by pieces of text")
    if run.max_send_delay_ms > 20:
        notes.append(f"requests left up to {run.max_send_delay_ms:.0f} ms late; that time is counted")
    return notes


def print_overview(runs: Sequence[RunResult], summaries: Sequence[Summary]) -> None:
    """A line a load: medians over its repetitions, and the range of its throughput."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("load")
    for title in ("output tok/s", "total tok/s", "req/s", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p50", "p99 ms"):
        table.add_column(title, justify="right")
    for load in dict.fromkeys(run.load for run in runs):
        found = [summary for run, summary in zip(runs, summaries, strict=True) if run.load == load]
        output = [summary.output_tokens_per_s for summary in found]
        spread = f" ({min(output):.0f}–{max(output):.0f})" if len(found) > 1 else ""
        pairs = [(s.ttft_ms, s.tpot_ms, s.itl_ms) for s in found]
        times = [_median(list(column)) for column in zip(*map(_p50_p99, pairs), strict=True)]
        table.add_row(
            load,
            f"{statistics.median(output):.1f}{spread}",
            f"{statistics.median(s.total_tokens_per_s for s in found):.1f}",
            f"{statistics.median(s.requests_per_s for s in found):.2f}",
            *times,
        )
    Console(width=WIDTH).print(table)


def _p50_p99(times: tuple[Percentiles, ...]) -> list[float | None]:
    return [value for one in times for value in (one.p50, one.p99)]


def _median(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f}" if known else "–"


def print_comparison(differences: Sequence[Difference]) -> None:
    """A table a load."""
    console = Console(width=WIDTH)
    for load in dict.fromkeys(difference.load for difference in differences):
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(load, min_width=18)
        for title in ("A", "B", "change", "95 % interval"):
            table.add_column(title, justify="right", min_width=9)
        table.add_column("verdict for B")
        for difference in differences:
            if difference.load == load:
                interval = "" if difference.low is None else f"{difference.low:+.1%} … {difference.high:+.1%}"
                table.add_row(
                    difference.metric, f"{difference.a:.2f}", f"{difference.b:.2f}", f"{difference.change:+.1%}",
                    interval, difference.verdict,
                )  # fmt: skip
        console.print(table)
