"""`servd bench` against the real HTTP front over a fake worker: what is printed, written and returned."""

from __future__ import annotations

import asyncio
import json

import pytest

from servd.benchmark import RequestOptions, Server, WorkloadSpec
from servd.benchmark.plan import RequestPlan, plan_requests
from servd.benchmark.report import read_report
from servd.cli import main
from servd.config import ServerConfig
from servd.errors import ConfigError
from tests.fake_server import FakeServer

SMALL = ("--num-requests", "6", "--input-tokens", "40:10", "--output-tokens", "5")
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.0,9000,4\n2023-11-16 18:17:03.1,30,4\n"


def bench(server, *argv):
    return main(["bench", "--url", server.url, *argv])


def test_closed_loops_print_a_block_each_and_a_table(servd, tmp_path, capsys):
    flags = ("--concurrency", "1,3", "--repeat", "2", "--slo", "ttft=60000", "--json", str(tmp_path / "r.json"))
    assert bench(servd, *SMALL, *flags) == 0
    out, err = capsys.readouterr()
    assert out.count("6 requests in") == 4
    assert out.count("goodput") == 4
    assert "(100% with ttft ≤ 60000 ms)" in out
    assert out.splitlines()[-3].split()[:3] == ["load", "output", "tok/s"]
    assert err == ""
    report = read_report(tmp_path / "r.json")
    assert [(run.load, run.repetition) for run in report.runs] == [("c=1", 0), ("c=3", 0), ("c=1", 1), ("c=3", 1)]
    assert len({run.salt for run in report.runs}) == 4
    assert (report.url, report.model, report.num_clipped, report.seed) == (servd.url, "fake", 0, 0)
    for run in report.runs:
        assert [row.output_tokens for row in run.rows] == [5] * 6
        assert all(row.has_usage and row.error is None for row in run.rows)


def test_equal_seeds_send_equal_work_and_equal_salts_equal_requests(servd, tmp_path):
    for name, flags in (("a", ()), ("b", ("--salt", "3")), ("c", ("--salt", "3")), ("d", ("--seed", "1"))):
        argv = (*SMALL, "--concurrency", "2", "--warmup", "0", "--json", str(tmp_path / name), *flags)
        assert bench(servd, *argv) == 0
    reports = {name: read_report(tmp_path / name) for name in "abcd"}
    assert reports["a"].data_sha256 == reports["b"].data_sha256 != reports["d"].data_sha256
    assert reports["a"].runs[0].salt != reports["b"].runs[0].salt == reports["c"].runs[0].salt == 3


def test_no_repetition_is_answered_from_the_cache_of_an_earlier_one(servd, tmp_path):
    flags = ("--concurrency", "1", "--repeat", "3", "--warmup", "0", "--workload", "prefix", "--num-requests", "4")
    assert bench(servd, *flags) == 0
    new = [r for plan in servd.fake.executor.plans for r in plan.new_requests if r.num_prompt_tokens > 500]
    beginnings = [tuple(r.token_ids[:500]) for r in new][-12:]
    assert [len(set(beginnings[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]  # within a repetition it is shared
    assert len(set(beginnings)) == 3


def test_rates_and_chat(servd, capsys):
    assert bench(servd, *SMALL, "--rate", "200,400", "--burstiness", "0.5", "--endpoint", "chat") == 0
    out = capsys.readouterr().out
    assert "200 req/s: 6 requests in" in out
    assert "400 req/s: 6 requests in" in out


def test_a_trace_is_replayed_and_cut_to_the_context_aloud(servd, tmp_path, capsys):
    (tmp_path / "trace").write_text(TRACE)
    flags = ("--trace", str(tmp_path / "trace"), "--trace-speed", "10", "--json", str(tmp_path / "r.json"))
    assert bench(servd, *flags, "--plot", str(tmp_path / "t.svg")) == 0
    assert "1 of 2 requests were cut to the server's context" in capsys.readouterr().err
    report = read_report(tmp_path / "r.json")
    assert [row.prompt_tokens for row in report.runs[0].rows] == [2044, 30]
    assert [row.start_s for row in report.runs[0].rows] == pytest.approx([0, 0.01])
    assert report.num_clipped == 1
    assert b"<svg" in (tmp_path / "t.svg").read_bytes()[:500]


def test_a_plot_that_cannot_be_written_is_told_and_the_figures_are_kept(servd, tmp_path, capsys):
    (tmp_path / "p.svg").symlink_to("/no/such/folder/p.svg")
    flags = ("--concurrency", "1", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.svg"))
    assert bench(servd, *SMALL, *flags) == 2
    out, err = capsys.readouterr()
    assert "6 requests in" in out
    assert err.startswith(f"servd: error: --plot {tmp_path}/p.svg: ")
    assert len(read_report(tmp_path / "r.json").runs) == 1


def test_a_dataset_is_sent_as_it_is_written(servd, tmp_path):
    (tmp_path / "d").write_text(json.dumps([{"messages": [{"role": "user", "content": "one two three four"}]}]))
    flags = ("--dataset", str(tmp_path / "d"), "--output-tokens", "3", "--prompt", "text", "--concurrency", "1")
    assert bench(servd, *flags) == 0
    prompts = {bytes(r.token_ids).decode() for plan in servd.fake.executor.plans for r in plan.new_requests}
    assert prompts and all(prompt.endswith(" three four") for prompt in prompts)


@pytest.mark.parametrize("flags", ["--prompt text", "--endpoint chat"])
def test_a_dataset_of_token_ids_is_not_sent_where_text_was_asked_for(servd, tmp_path, capsys, flags):
    (tmp_path / "d").write_text('{"prompt_token_ids": [65, 66], "output_tokens": 3}')
    assert bench(servd, "--dataset", str(tmp_path / "d"), *flags.split()) == 2
    assert "holds token ids; allowed with" in capsys.readouterr().err


def test_a_dataset_of_text_is_not_sent_where_token_ids_were_asked_for_and_nothing_makes_them(tmp_path):
    (tmp_path / "d").write_text('{"prompt": "one two", "output_tokens": 3}')
    plan = RequestPlan(WorkloadSpec(), dataset=tmp_path / "d", prompt="ids")
    server = Server("http://a.server", "m", max_model_len=None, software="", tokenizes=False)
    with pytest.raises(ConfigError, match="--prompt ids: .*/d holds text and http://a.server has no /tokenize"):
        asyncio.run(plan_requests(plan, server, RequestOptions()))


def test_failed_requests_are_counted_by_kind_written_and_exit_code_1(tmp_path, capsys):
    with FakeServer(tmp_path, settings={"max_num_seqs": 1, "max_num_queued_reqs": 1}) as server:
        flags = ("--concurrency", "1,6", "--warmup", "0", "--json", str(tmp_path / "r.json"))
        assert bench(server, *SMALL, *flags) == 1
    out, err = capsys.readouterr()
    (load, counted) = read_report(tmp_path / "r.json").summaries
    assert (load.failed, load.completed) == (0, 6)
    assert counted.failed > 0
    assert counted.errors == {"http 429": counted.failed}
    assert f"{counted.failed} failed ({counted.failed} http 429)" in out
    assert f"servd: error: {counted.failed} of 12 requests failed, first http 429: " in err


def test_a_server_that_cannot_answer_at_all_is_told_before_any_load(servd, capsys):
    assert bench(servd, *SMALL, "--extra-body", '{"deadline_ms": 1, "max_tokens": 1000}') == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "does not answer: event: the deadline" in err


def test_the_key_is_needed_sent_and_not_written(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SERVD_API_KEY", raising=False)
    flags = (*SMALL, "--concurrency", "2", "--json", str(tmp_path / "r.json"))
    with FakeServer(tmp_path, ServerConfig(port=0, api_key="sesame")) as server:
        assert bench(server, *flags) == 1
        assert "answered 401" in capsys.readouterr().err
        assert bench(server, *flags, "--api-key", "sesame") == 0
    assert b"sesame" not in (tmp_path / "r.json").read_bytes()


def test_a_dead_server_is_one_clear_line_and_exit_code_1(capsys):
    assert main(["bench", "--url", "http://127.0.0.1:1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("servd: error: no server answers at http://127.0.0.1:1")


def test_two_results_are_compared_in_words(servd, tmp_path, capsys):
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert bench(servd, *SMALL, "--concurrency", "1,2", "--repeat", "2", "--json", a) == 0
    assert bench(servd, *SMALL, "--concurrency", "2,3", "--repeat", "2", "--seed", "1", "--json", b) == 0
    capsys.readouterr()
    assert main(["bench", "compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "note: only A has c=1" in out
    assert "note: only B has c=3" in out
    assert "note: data_sha256 differs" in out
    assert "output tok/s" in out and "TTFT p99 ms" in out and "verdict" in out
    assert main(["bench", "compare", a, a]) == 0
    out = capsys.readouterr().out
    assert "note" not in out
    assert "better" not in out and "worse" not in out
    figures = [line for line in out.splitlines() if "%" in line and "interval" not in line]
    assert len(figures) >= 2 * 3  # rates of two loads; times of 0 ms have no ratio
    assert all("not significant" in line for line in figures)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--concurrency 0", "--concurrency is '0'"),
        ("--concurrency 1,x", "--concurrency is '1,x'"),
        ("--concurrency=", "--concurrency is ''"),
        ("--rate 0", "--rate is '0'"),
        ("--rate=", "--rate is ''"),
        ("--rate nan", "--rate is 'nan'"),
        ("--rate 1 --concurrency 1", "allowed: one of the two"),
        ("--burstiness 2", "only with --rate"),
        ("--rate 1 --burstiness 0", "--burstiness is 0"),
        ("--repeat 0", "--repeat is 0"),
        ("--warmup -1", "--warmup is -1"),
        ("--num-requests 0", "--num-requests is 0"),
        ("--trace t --trace-speed 0", "--trace-speed is 0"),
        ("--trace-limit 5", "allowed only with --trace"),
        ("--num-prefixes 5", "--num-prefixes: allowed only with --prefix-tokens"),
        ("--timeout nan", "--timeout is nan"),
        ("--input-tokens 0", "--input-tokens is '0'"),
        ("--slo x=1", "--slo is 'x=1'"),
        ("--slo=", "--slo is ''"),
        ("--extra-body [1]", "--extra-body is '[1]'"),
        ("--workload file", "--workload file"),
        ("--workload chat --dataset f", "--workload chat"),
        ("--trace t --dataset f", "--trace has its own requests"),
        ("--trace t --output-tokens 5", "--output-tokens: allowed only without --trace"),
        ("--dataset d --prefix-tokens 5", "--prefix-tokens: allowed only without --dataset"),
        ("--endpoint chat --prompt ids", "--prompt is ids"),
        ("--json /no/such/folder/r.json", "there is no folder /no/such/folder"),
        ("--json /tmp", "/tmp is a folder"),
        ("--plot x.txt", "--plot is x.txt"),
        ("--url localhost:8000", "--url is 'localhost:8000'"),
        ("compare /no/a.json /no/b.json", "/no/a.json is no result"),
    ],
)
def test_wrong_flags_are_refused_by_name(argv, named, capsys):
    assert main(["bench", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert named in line
