"""A comparison as Markdown: who gave what, and which lines were reached.

Knows nothing of measuring.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.peers.results import DISTURBED, Comparison, Quality, Row, p50, p99
from bench.peers.targets import TARGETS, Verdict, judge

MIB = 1 << 20
OVERVIEW = ("", "weights", "ready s", "first token s", "memory MiB", "beyond KV MiB", "right answers", "perplexity")
LOADS = ("", "load", "output tok/s (range)", "total tok/s", "TTFT p50 / p99 ms", "TPOT p50 / p99", "ITL p50 / p99")
TARGET_LINES = ("servd as", "what", "against", "asked", "reached", "")


def markdown(comparison: Comparison) -> str:
    """The whole page."""
    rounds = max((len(row.rounds) for row in comparison.rows), default=0)
    parts = [
        f"{comparison.machine}; commit {comparison.commit}; {comparison.started_at}; `{comparison.command}`",
        f"{comparison.model}; medians of {rounds} round{'s' * (rounds != 1)}; greedy, fixed lengths, HTTP streaming.",
        _table(OVERVIEW, map(_overview, comparison.rows)),
        _table(LOADS, (line for row in comparison.rows for line in _load_lines(row))),
        _table(TARGET_LINES, map(_verdict, _verdicts(comparison))),
        *_notes(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _overview(row: Row) -> tuple[str, ...]:
    if not row.rounds:
        return (row.name, row.weights, f"failed: {row.error}", *[""] * 5)
    quality = row.quality
    return (
        row.name,
        row.weights,
        f"{row.median(lambda one: one.start_s):.2f}",
        f"{row.first_token_s:.2f}",
        f"{row.median(lambda one: one.memory) / MIB:,.0f}",
        f"{row.memory_beyond_kv / MIB:,.0f}",
        f"{quality.num_right} of {quality.num_questions}" if quality else "",
        _perplexity(quality),
    )


def _perplexity(quality: Quality | None) -> str:
    if quality is None or quality.perplexity_change is None:
        return ""
    return f"{quality.perplexity_change:+.2%}, {'faithful' if quality.is_faithful else '**not faithful**'}"


def _load_lines(row: Row) -> Iterable[tuple[str, ...]]:
    for load in row.loads():
        results = row.results(load)
        rates = [result.summary.output_tokens_per_s for result in results]
        spread = f" ({min(rates):.0f}–{max(rates):.0f})" if len(rates) > 1 else ""
        mark = " !" if any(result.others_share > DISTURBED for result in results) else ""
        times = [_pair(row, load, name, digits) for name, digits in (("ttft_ms", 0), ("tpot_ms", 1), ("itl_ms", 1))]
        output = row.of_load(load, lambda summary: summary.output_tokens_per_s)
        total = row.of_load(load, lambda summary: summary.total_tokens_per_s)
        yield (row.name, load, f"{output:.1f}{spread}{mark}", f"{total:.0f}", *times)


def _pair(row: Row, load: str, name: str, digits: int) -> str:
    middle = row.of_load(load, lambda summary: p50(getattr(summary, name)))
    tail = row.of_load(load, lambda summary: p99(getattr(summary, name)))
    return f"{middle:.{digits}f} / {tail:.{digits}f}"


def _verdicts(comparison: Comparison) -> list[Verdict]:
    return [judge(comparison, target) for target in TARGETS]


def _verdict(verdict: Verdict) -> tuple[str, ...]:
    target = verdict.target
    unit = "×" if target.against else ""
    asked = f"{'≥' if target.at_least else '≤'} {target.limit:.3g}{unit}"
    rival = verdict.rival or ("itself" if not target.against else ", ".join(target.against).replace("*", "best peer"))
    if target.against == ("*",) and verdict.rival:
        rival = f"best peer ({verdict.rival})"
    reached = "not run" if verdict.value is None else f"{verdict.value:.3g}{unit}"
    outcome = {True: "pass", False: "**fail**", None: ""}[verdict.passed]
    return (target.ours, target.what, rival, asked, reached, outcome)


def _notes(comparison: Comparison) -> list[str]:
    notes = [
        f"`{row.name}`: {row.version}, {row.notes}; `{' '.join([*_assignments(row), *row.command])}`"
        for row in comparison.rows
    ]
    legend = (
        "Memory is the resident memory of all processes, shared pages counted once, at its highest after any load; "
        "beyond KV: once it answered its first request, without what is set aside for keys and values. "
        f"`!`: other processes took more than {DISTURBED:.0%} of the machine in one of the rounds."
    )
    hashes = ", ".join(f"{name} {digest[:12]}" for name, digest in comparison.workloads.items())
    failures = [
        f"{row.name}, {load}: {sum(result.summary.failed for result in row.results(load))} requests failed, "
        f"{sum(result.summary.short for result in row.results(load))} answers of another length than asked"
        for row in comparison.rows
        for load in row.loads()
        if any(result.summary.failed or result.summary.short for result in row.results(load))
    ]
    failures += [
        f"{row.name} failed after {len(row.rounds)} of its rounds: {row.error}" for row in comparison.rows if row.error
    ]
    items = [f"- {note}" for note in [f"Requests: seed {comparison.seed}, {hashes}.", *notes, *failures]]
    return [legend, "\n".join(items)]


def _assignments(row: Row) -> list[str]:
    return [f"{name}={value}" for name, value in row.env.items()]
