"""`servd bench` against a real server over the starter model, and `bench/offline.py` without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from servd.benchmark.report import read_report
from servd.cli import main

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


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


def test_the_same_requests_run_offline(starter_files, tmp_path):
    command = [sys.executable, "bench/offline.py", "--num-requests", "2", "--repeat", "1", "--max-model-len", "2048"]
    command += ["--kv-cache-memory", "128MiB", "--json", str(tmp_path / "r.json")]
    result = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.count("2 requests in")) == (0, 1), result.stderr
    figures = json.loads((tmp_path / "r.json").read_text())
    assert len(figures["output_tokens_per_s"]) == 1
    assert len(figures["data_sha256"]) == 64
