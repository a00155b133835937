"""Servers as processes: until they answer, what they take, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.peers.base import Home, Start
from bench.peers.process import free_port, running
from servd.errors import ConfigError

HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "held = bytearray(64 << 20); import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print("child", child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_memory_counts_children_and_none_outlives_the_block(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    with running(Start([sys.executable, "-c", HEALTHY, str(port)]), port, log) as server:
        child = int(log.read_text().split()[1])
        deadline = time.monotonic() + 30
        while server.memory() < 64 << 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 64 << 20 <= server.memory() < 256 << 20
        assert is_alive(child) and is_alive(server.session)
    assert not is_alive(child) and not is_alive(server.session)


def test_a_server_that_ends_before_it_answers_is_told_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ended with 3 before it answered; see .*log"):
        with running(Start([sys.executable, "-c", "raise SystemExit(3)"]), free_port(), tmp_path / "log"):
            pass


def test_the_process_sees_its_own_variables_beside_the_callers(tmp_path: Path) -> None:
    start = Start([sys.executable, "-c", "import os; print(os.environ['A_SETTING'], 'PATH' in os.environ)"],
                  {"A_SETTING": "its own"})  # fmt: skip
    with pytest.raises(ConfigError), running(start, free_port(), tmp_path / "log"):
        pass
    assert (tmp_path / "log").read_text() == f"its own {'PATH' in os.environ}\n"


def test_a_server_ends_with_a_comparison_that_was_killed(tmp_path: Path) -> None:
    comparison = f"""
import sys, time
from pathlib import Path
from bench.peers.base import Start
from bench.peers.process import free_port, running
port = free_port()
with running(Start([sys.executable, "-c", {HEALTHY!r}, str(port)]), port, Path({str(tmp_path / "log")!r})) as server:
    print(server.session, flush=True)
    time.sleep(600)
"""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", comparison]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        server = int(process.stdout.readline())
        process.kill()
    child = int((tmp_path / "log").read_text().split()[1])
    deadline = time.monotonic() + 30
    while is_alive(server) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)  # this server does not care for its own
    assert not is_alive(server)


def test_a_step_is_done_once_for_each_content(tmp_path: Path) -> None:
    home, done = Home(tmp_path), []
    for what in ("version 1", "version 1", "version 2"):
        home.once("build", what, lambda what=what: done.append(what))
    assert done == ["version 1", "version 2"]


def test_a_step_that_failed_is_done_again(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(ConfigError, match=r"ended with 1; see .*broken\.log"):
        home.once("step", "it", lambda: home.call("broken", [sys.executable, "-c", "raise SystemExit(1)"]))
    done = []
    home.once("step", "it", lambda: done.append("it"))
    assert done == ["it"]
