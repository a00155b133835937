"""`servd chat` against the real HTTP front over a fake worker: what is typed, what is shown, what the server saw."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from servd.cli import main
from servd.config import ServerConfig
from tests.fake_server import FakeServer

REPLIES = {
    "assistant: It is Paris.\nuser: Sure?": "Yes.",
    "capital": "It is Paris.",
    "colour": "\x1b[31mRed\x07 – 🟥.",
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer(tmp_path, replies=REPLIES) as running:
        yield running


def chat(monkeypatch: pytest.MonkeyPatch, typed: str, *argv: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return main(["chat", *argv])


def test_a_conversation_remembers_and_resets(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "The capital?\n\nSure?\n/reset\nSure?\n/exit\nnever read\n"
    assert chat(monkeypatch, typed, "--url", server.url, "--max-tokens", "20", "--temperature", "0") == 0
    out, err = capsys.readouterr()
    first, second, reset, third, _ = out.split("\n")
    assert (first, second, reset) == ("It is Paris.", "Yes.", "(the conversation is forgotten)")
    assert len(third) == 20  # the fake's answer to a prompt it does not know
    assert err == ""


def test_the_system_message_is_sent_and_survives_a_reset(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "Hi\n/reset\nHi\n"
    argv = ["--url", server.url + "/v1/", "--system", "About the capital.", "--max-tokens", "20"]
    assert chat(monkeypatch, typed, *argv) == 0
    assert capsys.readouterr().out == "It is Paris.\n(the conversation is forgotten)\nIt is Paris.\n"


def test_control_characters_do_not_reach_the_terminal(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "colour?\n", "--url", server.url) == 0
    assert capsys.readouterr().out == "[31mRed – 🟥.\n"


def test_an_unknown_command_and_a_refused_message_do_not_end_it(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = f"/quit now\n{'x' * 3000}\nThe capital?\n"
    assert chat(monkeypatch, typed, "--url", server.url) == 1  # a script must see that not all was answered
    out, err = capsys.readouterr()
    assert out.startswith("unknown command /quit; /reset")
    assert out.endswith("\nIt is Paris.\n")
    assert "the server answered 400: messages has" in err


def test_the_key_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(tmp_path, ServerConfig(port=0, api_key="k"), replies=REPLIES) as server:
        assert chat(monkeypatch, "The capital?\n", "--url", server.url) == 1
        assert "the server answered 401" in capsys.readouterr().err
        assert chat(monkeypatch, "The capital?\n", "--url", server.url, "--api-key", "k") == 0
        monkeypatch.setenv("SERVD_API_KEY", "k")
        assert chat(monkeypatch, "The capital?\n", "--url", server.url) == 0
        assert capsys.readouterr().out == "It is Paris.\n" * 2


def test_no_server_at_the_url_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "Hi\n", "--url", "http://127.0.0.1:1") == 1
    err = capsys.readouterr().err
    assert err.startswith("servd: error: no server answers at http://127.0.0.1:1")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--url", "localhost:8000"], "--url is 'localhost:8000'; allowed: http://HOST:PORT"),
        (["--url", "http://"], "--url is 'http://'"),
        (["--url", "http://127.0.0.1:99999"], "--url is 'http://127.0.0.1:99999'"),
        (["--url", "ftp://127.0.0.1"], "--url is 'ftp://127.0.0.1'"),
        (["--url", "http://127.0.0.1:1", "some/model"], "MODEL some/model"),
    ],
)
def test_what_is_no_server_is_told_and_not_tried(
    argv: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "Hi\n", *argv) == 2
    assert named in capsys.readouterr().err


def test_a_server_that_does_not_start_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert chat(monkeypatch, "Hi\n", "no/such/model.gguf") == 1
    err = capfd.readouterr().err
    assert "'no/such/model.gguf'" in err  # the child's line
    assert "the server did not start (exit code 2)" in err
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_stops_the_answer_and_frees_its_blocks(tmp_path: Path) -> None:
    with (
        FakeServer(tmp_path, replies=REPLIES, step_delay=0.02) as server,
        subprocess.Popen(
            [sys.executable, "-m", "servd.cli", "chat", "--url", server.url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Endless\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"The capital?\n")
        process.stdin.close()
        rest = process.stdout.read().decode()
        assert process.wait(10) == 0
        assert " (stopped)\nIt is Paris.\n" in rest
        stats = server.fake.engine.stats()
        assert (stats.running, stats.kv_blocks_used) == (0, 0)
