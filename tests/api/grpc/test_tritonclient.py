"""tritonclient, unchanged, against both fronts: infer, streams, metadata, readiness, errors.

Needs `tritonclient[grpc,http]`, in a process of its own: its stubs and servd's describe the same package.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from servd.api.grpc.server import start_grpc
from servd.api.http.app import start_http, stop_http
from servd.api.service import InferenceService
from servd.config import ServerConfig
from tests.fakes import FakeEngine

ANSWER = " Paris, of course – 🗼"


def test_a_program_for_triton_works_unchanged(tmp_path: Path) -> None:
    async def test() -> None:
        async with FakeEngine(tmp_path, executor_options={"replies": {"capital": ANSWER}}) as fake:
            service = InferenceService(fake.engine, "fake")
            config = ServerConfig(port=0, grpc_port=0)
            runner, http_port = await start_http(service, config)
            server, grpc_port = await start_grpc(service, config)
            try:
                program = await asyncio.create_subprocess_exec(
                    sys.executable, str(Path(__file__).with_name("triton_program.py")),
                    f"127.0.0.1:{grpc_port}", f"127.0.0.1:{http_port}", "fake",
                    stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                )  # fmt: skip
                output, errors = await asyncio.wait_for(program.communicate(), 120)
                assert program.returncode == 0, errors.decode()
                _check(json.loads(output))
                await fake.wait_idle()
            finally:
                await server.stop(0)
                await stop_http(runner)

    asyncio.run(test())


def _check(seen: dict[str, dict[str, object]]) -> None:
    over_grpc, over_http = seen["grpc"], seen["http"]
    assert over_grpc["ready"] == over_http["ready"] == [True, True, True]
    assert over_grpc["metadata"] == over_http["metadata"] == "fake"
    assert over_grpc["index"] == over_http["index"] == "READY"
    assert over_grpc["statistics"] is over_http["statistics"] is True
    assert (over_grpc["server"], over_grpc["decoupled"], over_http["config"]) == ("servd", True, 0)
    assert over_grpc["infer"] == over_grpc["stream"] == seen["aio"] == over_http["infer"] == ANSWER[:12]
    assert over_http["json"] == ANSWER[:12]
    assert int(str(over_grpc["num_replies"])) > 1
    assert over_grpc["status"] == "StatusCode.NOT_FOUND"
    for error in (over_grpc["stream_error"], over_http["error"]):
        assert "no-such-model" in str(error)
