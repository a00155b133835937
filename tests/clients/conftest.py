"""A real server with the starter model and a key, for real clients that know nothing of servd.

Runs in an environment without servd: the server is the command in SERVD (`make test-clients` sets it).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEY = "key-of-the-client-tests-0123456789"
MODEL = "smollm2-135m-instruct"
START_SECONDS = 300.0


@dataclass(frozen=True)
class Server:
    """Where it is; the model is MODEL, the key KEY."""

    port: int
    grpc_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    ports = Server(free_port(), free_port())
    command = [
        os.environ.get("SERVD", str(ROOT / ".venv/bin/servd")), "serve", MODEL, "--port", str(ports.port),
        "--grpc-port", str(ports.grpc_port), "--max-model-len", "4096", "--api-key", KEY, "--log-level", "warning",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_until_healthy(process, ports.url)
        yield ports
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError(f"no answer within {START_SECONDS} s")
