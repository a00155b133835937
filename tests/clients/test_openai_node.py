"""OpenAI's npm package, in Node: chat, a stream, a tool, a response."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import KEY, MODEL, Server

SCRIPT = Path(__file__).with_name("openai_node.mjs")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert shutil.which("npm"), "npm is needed; Debian and Ubuntu: apt-get install nodejs npm"
    folder = tmp_path_factory.mktemp("node")
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "openai@>=5"], cwd=folder, check=True, timeout=300)
    shutil.copy(SCRIPT, folder)
    return folder


def test_the_npm_client(server: Server, package: Path) -> None:
    run = subprocess.run(
        ["node", SCRIPT.name, server.openai_url, KEY, MODEL], cwd=package, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "all well"
