"""Figures from rows: percentiles, rates, goodput; reports on disk; what a comparison calls a difference."""

from __future__ import annotations

import subprocess

import msgspec
import numpy as np
import pytest

import servd
from servd.benchmark.compare import compare_reports
from servd.benchmark.report import Report, command_line, read_report, this_commit, this_machine, write_report
from servd.benchmark.results import SLO, Percentiles, RequestRow, RunResult
from servd.errors import ConfigError


def row(i=0, ttft=100.0, gaps=(10.0, 30.0), error=None, output_tokens=None):
    tokens = len(gaps) + 1 if output_tokens is None else output_tokens
    return RequestRow(
        id=f"r{i}", start_s=0.1 * i, prompt_tokens=50, output_tokens=tokens, asked_tokens=3, ttft_ms=ttft,
        e2e_ms=ttft + sum(gaps), itl_ms=list(gaps), has_usage=True, error=error,
    )  # fmt: skip


def run(rows, load="c=8", repetition=0, wall=2.0):
    return RunResult(
        load=load, repetition=repetition, salt=1, started_at="2026-01-01T00:00:00+00:00", wall_s=wall,
        client_cpu_s=0.1, rows=rows,
    )  # fmt: skip


def test_percentiles_lie_between_ranks_and_nothing_has_none():
    assert Percentiles.of([1.0, 2.0, 3.0, 4.0]) == Percentiles(mean=2.5, p50=2.5, p90=3.7, p99=3.97)
    assert Percentiles.of([]) == Percentiles(mean=None, p50=None, p90=None, p99=None)


def test_a_summary_counts_what_succeeded_and_names_what_failed():
    rows = [row(0), row(1), row(2, error="http 429"), row(3, error="http 429"), row(4, error="timeout")]
    summary = run(rows).summary()
    assert (summary.completed, summary.failed) == (2, 3)
    assert summary.errors == {"http 429": 2, "timeout": 1}
    assert (summary.prompt_tokens, summary.output_tokens) == (100, 6)
    assert (summary.requests_per_s, summary.output_tokens_per_s, summary.total_tokens_per_s) == (1.0, 3.0, 53.0)
    assert summary.ttft_ms.p50 == 100
    assert summary.itl_ms.mean == summary.tpot_ms.mean == 20
    assert summary.e2e_ms.p99 == 140
    assert summary.goodput_per_s is None


def test_tpot_counts_tokens_where_pieces_hold_several():
    assert row(gaps=(10.0, 30.0), output_tokens=5).tpot_ms == 10
    assert row(gaps=()).tpot_ms is None


def test_answers_of_another_length_than_asked_are_counted():
    assert run([row(), row(output_tokens=2), row(output_tokens=9)]).summary().short == 2


def test_goodput_keeps_every_limit_and_failures_keep_none():
    rows = [row(ttft=90), row(ttft=110), row(gaps=(50.0, 50.0)), row(error="timeout"), row(gaps=(), ttft=100)]
    assert run(rows).summary(SLO.parse("ttft=100")).good_share == 0.6
    assert run(rows).summary(SLO.parse("ttft=100,tpot=20")).good_share == 0.4
    assert run(rows).summary(SLO.parse("e2e=130")).goodput_per_s == 1.0


@pytest.mark.parametrize("text", ["", "ttft", "ttft=x", "ttft=-1", "ttft=0", "foo=5", "ttft=5,,"])
def test_a_wrong_slo_is_refused(text):
    with pytest.raises(ConfigError, match="--slo is"):
        SLO.parse(text)


def report(runs, data="same"):
    return Report(
        command="servd bench", servd_version="0", commit=None, started_at="", machine=this_machine(), url="u",
        model="m", server="", endpoint="completions", workload="w", num_requests=1, num_clipped=0, seed=0,
        data_sha256=data, summaries=[r.summary() for r in runs], runs=runs,
    )  # fmt: skip


def test_a_report_is_read_back_as_it_was_written(tmp_path):
    written = report([run([row(), row(1, error="timeout")])])
    write_report(written, tmp_path / "r.json")
    assert read_report(tmp_path / "r.json") == written
    machine = msgspec.json.decode((tmp_path / "r.json").read_bytes())["machine"]
    assert machine["cores"] >= 1 and machine["cpu"] and machine["python"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"command": "\xff"}'])
def test_what_is_no_report_is_told(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"r\.json is no result of servd bench"):
        read_report(tmp_path / "r.json")


def test_a_report_of_another_format_is_told(tmp_path):
    other = report([run([row()])])
    other.format = "servd-bench-9"
    write_report(other, tmp_path / "r.json")
    with pytest.raises(ConfigError, match="servd-bench-9"):
        read_report(tmp_path / "r.json")


def test_no_key_is_written_into_the_command():
    assert command_line(["bench", "--api-key", "abc", "--api-key=abc", "--seed", "1"]) == (
        "servd bench --api-key ... --api-key=... --seed 1"
    )


def test_the_commit_of_a_checkout_is_known_and_whether_it_is_what_runs(tmp_path, monkeypatch):
    def git(*argv):
        command = ("git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *argv)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    (tmp_path / "servd").mkdir()
    source = tmp_path / "servd" / "__init__.py"
    source.write_text("")
    monkeypatch.setattr(servd, "__file__", str(source))
    assert this_commit() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "m")
    git("tag", "-m", "v", "v1")
    head = git("rev-parse", "HEAD")[:12]
    (tmp_path / "untracked").write_text("")
    assert this_commit() == head
    source.write_text("1")
    assert this_commit() == head + "+"


def noisy_runs(factor, count, seed, noise=0.03, load="c=8"):
    rng = np.random.default_rng(seed)
    return [
        run(
            [
                row(i, ttft=factor * (80 + i) * drift, gaps=(*rng.normal(20 * factor * drift, 1, 9),))
                for i in range(30)
            ],
            load, repetition=k, wall=2 * factor * drift,
        )
        for k, drift in enumerate(1 + noise * rng.standard_normal(count))
    ]  # fmt: skip


def by_metric(a, b):
    return {difference.metric: difference for difference in compare_reports(a, b)}


def test_a_real_difference_is_found_and_has_its_direction():
    found = by_metric(report(noisy_runs(1.0, 5, 1)), report(noisy_runs(2.0, 5, 2)))
    assert found["output tok/s"].change == pytest.approx(-0.5, abs=0.05)
    assert found["output tok/s"].verdict == found["TTFT p50 ms"].verdict == "worse"
    assert found["TTFT p50 ms"].low < 1.0 < found["TTFT p50 ms"].high
    back = by_metric(report(noisy_runs(2.0, 5, 2)), report(noisy_runs(1.0, 5, 1)))
    assert {back[m].verdict for m in ("output tok/s", "TTFT p99 ms", "ITL mean ms")} == {"better"}


def test_noise_is_seldom_called_a_difference():
    wrong = 0
    for seed in range(40):
        found = by_metric(report(noisy_runs(1.0, 3, 2 * seed)), report(noisy_runs(1.0, 3, 2 * seed + 1)))
        wrong += found["output tok/s"].is_significant
    assert wrong <= 4  # 2 of 40 by construction


def test_one_run_a_side_says_nothing_of_throughput_and_pairs_requests():
    a, b = noisy_runs(1.0, 1, 1, noise=0), noisy_runs(1.01, 1, 2, noise=0)
    found = by_metric(report(a), report(b))
    assert found["output tok/s"].low is None
    assert "repeat" in found["output tok/s"].verdict
    assert found["TTFT p50 ms"].verdict == "worse, if the machine did not drift"  # each 1 % slower than itself
    unpaired = by_metric(report(a), report(b, data="other"))
    assert unpaired["TTFT p50 ms"].verdict == "not significant"


def test_equal_reports_do_not_differ_and_the_answer_is_repeatable():
    a = report(noisy_runs(1.0, 3, 1))
    assert not any(difference.is_significant for difference in compare_reports(a, a))
    b = report(noisy_runs(1.1, 3, 2))
    assert compare_reports(a, b) == compare_reports(a, b)


def test_only_common_loads_are_compared():
    a = report(noisy_runs(1.0, 2, 1) + noisy_runs(1.0, 2, 1, load="c=1"))
    b = report(noisy_runs(1.0, 2, 1, load="c=1") + noisy_runs(1.0, 2, 1, load="4 req/s"))
    assert {difference.load for difference in compare_reports(a, b)} == {"c=1"}


def test_a_side_where_everything_failed_has_no_differences():
    failed = report([run([row(i, error="refused") for i in range(3)])])
    assert compare_reports(report(noisy_runs(1.0, 1, 1)), failed) == []
