"""`servd bench` against a real server over the starter model."""

import pytest

from servd.benchmark.report import read_report
from servd.cli import main


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_every_answer_has_the_tokens_asked_and_the_figures_add_up(server, tmp_path, capsys, endpoint):
    flags = ["--num-requests", "6", "--input-tokens", "60:20", "--output-tokens", "8:2", "--concurrency", "1,4"]
    path = tmp_path / "r.json"
    assert main(["bench", "--url", server.url, *flags, "--endpoint", endpoint, "--json", str(path)]) == 0
    assert capsys.readouterr().out.count("6 requests in") == 2
    report = read_report(path)
    assert report.model == "smollm2-135m-instruct"
    for run, summary in zip(report.runs, report.summaries, strict=True):
        assert all(row.output_tokens == row.asked_tokens for row in run.rows)
        assert summary.output_tokens == sum(row.asked_tokens for row in run.rows)
        assert (summary.failed, summary.short, summary.without_usage) == (0, 0, 0)
        assert all(0 < row.ttft_ms <= row.e2e_ms for row in run.rows)
