"""The command line as a whole: exit codes, one-line errors, what `--help` costs, what `serve` checks and prints."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import servd
from servd.api.lifecycle import Ready
from servd.cli import main
from servd.cli.progress import progress_display
from servd.cli.serve import check_addresses, ready_lines
from servd.config import ServerConfig
from servd.errors import ConfigError

COMMANDS = ["bench", "chat", "eval", "generate", "keys", "kv-probe", "pull", "serve"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS), ["--version"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys\nfrom servd.cli import main\n"
        f"try:\n    main({argv})\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print(sorted({'torch', 'aiohttp', 'grpc', 'rich', 'numpy', 'tokenizers'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert result.stdout


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"servd {servd.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "COMMAND"),
        (["fly"], "'fly'"),
        (["serve", "--port", "x"], "--port"),
        (["serve", "--block-size", "999"], "--block-size is 999"),
        (["serve", "--port", "70000"], "--port is 70000"),
        (["serve", "--grpc-port", "-2"], "--grpc-port is -2"),
        (["serve", "--port", "8123", "--grpc-port", "8123"], "--grpc-port is 8123"),
        (["serve", "--host", "203.0.113.1", "--api-key", "k"], "203.0.113.1"),
        (["serve", "--port", "0", "--grpc-port", "-1", "--api-keys-file", "/none"], "--api-keys-file /none"),
        (["serve", "--port", "0", "--grpc-port", "-1", "--cors-origin", "a.example"], "--cors-origin is 'a.example'"),
        (["serve", "--port", "0", "--grpc-port", "-1", "--host", "0.0.0.0"], "--insecure-no-auth"),
        (["pull"], "which model?"),
        (["pull", "gpt-5"], "'gpt-5'"),
        (["generate"], "--prompt"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("servd: error: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_taken_port_is_told_before_anything_else(
    flag: str, taken_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["serve", "no-such-model", "--port", "0", "--grpc-port", "0", flag, str(taken_port)]
    assert main(argv) == 2
    assert capsys.readouterr().err == (
        f"servd: error: {flag} is {taken_port}: cannot listen on 127.0.0.1:{taken_port}: Address already in use\n"
    )


OPEN = ServerConfig(host="0.0.0.0", port=0, grpc_port=-1)


def test_an_open_door_must_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="set --api-key .* or say --insecure-no-auth"):
        check_addresses(OPEN)
    check_addresses(dataclasses.replace(OPEN, insecure_no_auth=True))
    assert "anyone who can reach 0.0.0.0" in capsys.readouterr().err
    for guard in ({"api_key": "k"}, {"api_keys_file": "keys"}, {"tls_client_ca": "ca.pem"}):
        check_addresses(dataclasses.replace(OPEN, **guard))
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        check_addresses(ServerConfig(host=host, port=0, grpc_port=0))
    assert capsys.readouterr().err == ""


def test_ready_lines_hold_a_curl_that_can_be_pasted() -> None:
    url, curl, grpc = ready_lines(Ready("it's", 8000, 8001, has_chat_template=True), ServerConfig(api_key="secret"))
    assert (url, grpc) == ("http://127.0.0.1:8000", "gRPC 127.0.0.1:8001")
    words = shlex.split(curl)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "it's"
    assert "secret" not in curl
    assert "Authorization: Bearer $SERVD_API_KEY" in curl


def test_ready_lines_of_a_base_model_behind_ipv6_without_grpc() -> None:
    url, curl, grpc = ready_lines(Ready("m", 80, None, has_chat_template=False), ServerConfig(host="::"))
    assert (url, grpc) == ("http://[::1]:80", "gRPC off")
    assert "/v1/completions" in curl
    assert "prompt" in json.loads(shlex.split(curl)[-1])


def test_the_catalogue_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "--list"]) == 0
    assert "smollm2-135m-instruct" in capsys.readouterr().out


def test_progress_off_a_terminal_is_few_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_display() as progress:
        for done in range(1001):
            progress("download", done, 1000)
    assert sys.stderr.getvalue() == "".join(f"download: {percent} %\n" for percent in (0, 25, 50, 75, 100))  # type: ignore[attr-defined]


def test_progress_on_a_terminal_is_one_bar_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_display() as progress:
        for what in ("download", "load"):
            for done in range(0, 101, 10):
                progress(what, done, 100)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "download" in shown
    assert "load" in shown
    assert shown.count("100%") >= 2


def test_a_model_that_does_not_exist_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "no-such-model", "--port", "0", "--grpc-port", "-1", "--executor", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_traceback() -> None:
    # The pipe's other end is closed before anything is written, as by `servd pull --list | true`.
    code = (
        "import os, sys\nfrom servd.cli import main\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        "sys.exit(main(['pull', '--list']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=with_path())
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_ended_download_leaves_no_pip_behind(number: int, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # takes pip's call and never answers
        index.settimeout(30)
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        pip = {"PIP_INDEX_URL": url, "PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", "NO_PROXY": "127.0.0.1"}
        environment = with_path() | pip | {"SERVD_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "servd.cli", "pull", "smollm2-135m-instruct"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
            connection, _ = index.accept()
            with connection:
                connection.settimeout(20)
                process.send_signal(number)
                assert process.wait(20) == 128 + number
                while connection.recv(4096):  # the request, then the end: pip, which held the connection, is gone
                    pass
    assert [path.name for path in (tmp_path / "models" / "smollm2-135m-instruct").iterdir()] == [".lock"]


def with_path() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_config_error_is_flattened_to_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ConfigError("first\n  second")

    monkeypatch.setattr("servd.hub.pull", fail)
    assert main(["pull", "x"]) == 2
    assert capsys.readouterr().err == "servd: error: first second\n"
