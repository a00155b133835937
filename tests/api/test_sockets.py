"""What listens: the ports of the API and nothing else; and nothing in servd unpickles or evaluates data.

Faults: 29 (internal sockets), 27 (pickle), 12 (code from bodies).
"""

from __future__ import annotations

import ast
import asyncio
import os
from pathlib import Path

import pytest

import servd
from servd.api.grpc.server import start_grpc
from servd.api.http.app import start_http, stop_http
from servd.api.service import InferenceService
from servd.config import EngineConfig, ServerConfig
from servd.engine.async_engine import AsyncEngine
from servd.executor.multiproc import MultiprocExecutor
from servd.hub import ModelFiles
from tests.fakes import VOCAB_SIZE, ByteTokenizer

LISTENING = "0A"


class EchoExecutor(MultiprocExecutor):
    """Real worker processes with real channels, without a model."""

    worker_module = "tests.unit.executor.echo_worker"


def listening_ports(pid: int) -> set[int]:
    """TCP ports, of all addresses, on which a process listens."""
    inodes = socket_inodes(pid)
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def named_unix_sockets(pid: int) -> set[str]:
    """Names under which others could find a Unix socket of a process."""
    inodes = socket_inodes(pid)
    lines = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]]
    return {fields[7] for fields in lines if len(fields) > 7 and fields[6] in inodes}


def socket_inodes(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def test_only_the_ports_of_the_api_listen(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"max_position_embeddings": 128, "vocab_size": {VOCAB_SIZE}}}')

    async def main() -> None:
        before = listening_ports(os.getpid())
        config = EngineConfig.from_flat(block_size=32)
        executor = EchoExecutor(config)
        engine = AsyncEngine(config, ModelFiles("echo", tmp_path, ()), ByteTokenizer(), executor)  # type: ignore[arg-type]
        await engine.start()
        service = InferenceService(engine, "echo")
        runner, port = await start_http(service, ServerConfig(port=0))
        server, grpc_port = await start_grpc(service, ServerConfig(grpc_port=0))
        try:
            assert listening_ports(os.getpid()) - before == {port, grpc_port}
            (worker,) = executor.pids
            assert listening_ports(worker) == set()
            assert named_unix_sockets(worker) == named_unix_sockets(os.getpid()) == set()
        finally:
            await server.stop(0)
            await stop_http(runner)
            await engine.close()

    asyncio.run(main())


FORBIDDEN_MODULES = {
    "pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "multiprocessing"
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {("torch", "load"), ("os", "system"), ("os", "popen"), ("np", "load"), ("numpy", "load")}
SOURCES = sorted(path for path in Path(servd.__file__).parent.rglob("*.py") if "_pb" not in path.parts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(Path(servd.__file__).parent)))
def test_nothing_turns_data_into_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                assert not {alias.name.partition(".")[0] for alias in node.names} & FORBIDDEN_MODULES
            case ast.ImportFrom():
                assert (node.module or "").partition(".")[0] not in FORBIDDEN_MODULES
            case ast.Call(func=ast.Name(id=name)):
                assert name not in FORBIDDEN_CALLS, f"line {node.lineno}"
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=attr)):
                assert (owner, attr) not in FORBIDDEN_METHODS, f"line {node.lineno}"
            case ast.keyword(arg="shell", value=value) | ast.keyword(arg="trust_remote_code", value=value):
                assert isinstance(value, ast.Constant) and value.value is False, f"line {value.lineno}"
