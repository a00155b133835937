"""Tables and verdicts of a comparison, from rounds with known figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.peers import plot, table
from bench.peers.results import Comparison, LoadResult, Quality, Round, Row
from bench.peers.targets import TARGETS, Verdict, judge
from servd.benchmark import Percentiles, Summary
from servd.errors import ConfigError

MIB = 1 << 20


def times(p50: float, p99: float) -> Percentiles:
    return Percentiles(mean=p50, p50=p50, p90=p99, p99=p99)


def load(name: str, rate: float, ttft: float = 100.0, *, others: float = 0.0, failed: int = 0) -> LoadResult:
    summary = Summary(
        completed=64, failed=failed, errors={}, short=0, without_usage=0, wall_s=1.0, prompt_tokens=0, output_tokens=0,
        requests_per_s=1.0, output_tokens_per_s=rate, total_tokens_per_s=2 * rate, goodput_per_s=None, good_share=None,
        ttft_ms=times(ttft, 4 * ttft), tpot_ms=times(10, 20), itl_ms=times(9, 30), e2e_ms=times(1, 2),
    )  # fmt: skip
    return LoadResult(load=name, summary=summary, others_share=others)


def round(*loads: LoadResult, first_token_s: float = 2.0, mib: int = 500) -> Round:
    return Round(
        start_s=first_token_s - 0.5, first_token_s=first_token_s, memory_at_start=mib * MIB, memory=2 * mib * MIB,
        loads=list(loads),
    )  # fmt: skip


def row(name: str, *rounds: Round, kv_bytes_at_start: int = 0, error: str | None = None) -> Row:
    return Row(
        name=name, weights="bf16", version=f"{name} 1", command=["serve"], env={"A": "1"}, notes="",
        rounds=list(rounds),
        kv_bytes_at_start=kv_bytes_at_start, error=error, quality=Quality(num_right=30, num_questions=50),
    )  # fmt: skip


def comparison(*rows: Row) -> Comparison:
    return Comparison(
        command="run", machine="a machine", commit="abc", started_at="2026-01-01T00:00+00:00", model="m",
        workloads={"chat": "0123456789abcdef"}, seed=0, rows=list(rows),
    )  # fmt: skip


def verdicts(ours: str, what: str, *rows: Row) -> list[Verdict]:
    found = comparison(*rows)
    return [judge(found, target) for target in TARGETS if (target.ours, target.what) == (ours, what)]


def test_a_ratio_is_of_medians_over_rounds() -> None:
    ours = row("servd-bf16", *(round(load("c=8", rate)) for rate in (100.0, 330.0, 320.0)))
    theirs = row("vllm-cpu", *(round(load("c=8", rate)) for rate in (900.0, 200.0, 180.0)))
    (verdict,) = verdicts("servd-bf16", "c=8 output tok/s", ours, theirs)
    assert verdict.value == pytest.approx(1.6)
    assert verdict.passed


def test_the_best_peer_is_no_row_of_ours() -> None:
    rows = [
        row("servd", round(load("c=8", 500))), row("servd-bf16", round(load("c=8", 450))),
        row("vllm-cpu", round(load("c=8", 100))), row("openvino-int8", round(load("c=8", 250))),
    ]  # fmt: skip
    (verdict,) = verdicts("servd", "c=8 output tok/s", *rows)
    assert (verdict.rival, verdict.value, verdict.passed) == ("openvino-int8", 2.0, False)


def test_times_and_memory_are_to_be_small() -> None:
    ours = row("servd-bf16", round(load("c=32", 1, ttft=60), first_token_s=2.0, mib=300))
    theirs = row(
        "vllm-cpu", round(load("c=32", 1, ttft=100), first_token_s=60.0, mib=2848), kv_bytes_at_start=2048 * MIB
    )
    found = {
        what: [(verdict.value, verdict.passed) for verdict in verdicts("servd-bf16", what, ours, theirs)]
        for what in ("c=32 TTFT p50", "start to first token, s", "start to first token", "memory beyond the KV")
    }
    assert found == {
        "c=32 TTFT p50": [(0.6, False)],
        "start to first token, s": [(2.0, True)],
        "start to first token": [(pytest.approx(1 / 30), True)],
        "memory beyond the KV": [(0.375, True)],
    }


def test_what_was_not_run_has_no_verdict() -> None:
    ours = row("servd-bf16", round(load("c=8", 100)))
    failed = row("vllm-cpu", error="it did not start")
    found = [
        *verdicts("servd-bf16", "c=8 output tok/s", ours, failed),
        *verdicts("servd-bf16", "c=32 output tok/s", ours, row("vllm-cpu", round(load("c=8", 1)))),
    ]
    assert [(verdict.value, verdict.passed) for verdict in found] == [(None, None)] * 2


def test_the_page_shows_figures_failures_and_disturbed_loads() -> None:
    page = table.markdown(
        comparison(
            row("servd-bf16", round(load("c=8", 100)), round(load("c=8", 120, others=0.2))),
            row("vllm-cpu", round(load("c=8", 50, failed=3)), kv_bytes_at_start=100 * MIB),
            row("llama.cpp-bf16", error="no compiler"),
            row("openvino-int8", round(load("c=8", 70)), error="it ended in its second round"),
        )
    )
    assert "| servd-bf16 | c=8 | 110.0 (100–120) ! | 220 | 100 / 400 | 10.0 / 20.0 | 9.0 / 30.0 |" in page
    assert "| vllm-cpu | bf16 | 1.50 | 2.00 | 1,000 | 400 | 30 of 50 |  |" in page
    assert "| llama.cpp-bf16 | bf16 | failed: no compiler |" in page
    assert "vllm-cpu, c=8: 3 requests failed" in page
    assert "openvino-int8 failed after 1 of its rounds: it ended in its second round" in page
    assert "| servd-bf16 | c=8 output tok/s | vllm-cpu | ≥ 1.6× | 2.2× | pass |" in page


def test_the_plot_is_drawn_of_rows_with_different_loads(tmp_path: Path) -> None:
    found = comparison(
        row("servd", round(load("c=1", 10), load("c=8", 100))), row("vllm-cpu", round(load("c=8", 50))),
        row("openvino-int8", error="none"),
    )  # fmt: skip
    plot.draw(found, tmp_path / "peers.svg")
    drawn = (tmp_path / "peers.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "openvino-int8" not in drawn


def test_a_comparison_goes_on_with_the_rounds_of_an_earlier_one() -> None:
    earlier = comparison(row("servd", round(load("c=8", 100))), row("vllm-cpu", round(load("c=8", 50))))
    later = comparison(row("servd"), row("openvino-int8"))
    later.take_over(earlier)
    assert {one.name: len(one.rounds) for one in later.rows} == {"openvino-int8": 0, "servd": 1, "vllm-cpu": 1}


def test_rounds_of_other_code_are_not_taken_over() -> None:
    earlier, later = comparison(row("servd", round(load("c=8", 100)))), comparison(row("servd"))
    earlier.commit = "other"
    with pytest.raises(ConfigError, match="--resume: commit was 'other' and is 'abc'"):
        later.take_over(earlier)
