"""A gRPC server over the real engine with a fake executor, and a client of it.

Knows nothing of what is tested.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from google.rpc import error_details_pb2, status_pb2

from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc as pb_grpc
from servd.api.grpc.server import GrpcServer, start_grpc
from servd.api.service import InferenceService
from servd.config import ServerConfig
from tests.fakes import FakeEngine

MODEL = "fake"


@dataclass
class Served:
    """What a test holds."""

    fake: FakeEngine
    server: GrpcServer
    channel: grpc.aio.Channel
    stub: Any

    def generate(self, text: str = "Hello", timeout: float | None = None, **sampling: Any) -> Any:
        """A Generate call of a text prompt."""
        request = pb.GenerateRequest(text=text, sampling_params=pb.SamplingParams(**sampling))
        return self.stub.Generate(request, timeout=timeout)


@asynccontextmanager
async def served(
    folder: Path,
    *,
    server_config: ServerConfig | None = None,
    write_timeout: float = 60.0,
    **fake_options: Any,
) -> AsyncIterator[Served]:
    """A listening server on a free port and a connected client."""
    config = server_config or ServerConfig(grpc_port=0)
    async with FakeEngine(folder, **fake_options) as fake:
        server, port = await start_grpc(
            InferenceService(fake.engine, MODEL), config, write_timeout=write_timeout
        )
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield Served(fake, server, channel, pb_grpc.InferenceStub(channel))  # type: ignore[no-untyped-call]
        finally:
            await server.stop(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine on the event loop that servd serves with."""
    uvloop.run(test())


async def text_of(call: Any) -> str:
    """The whole text of a stream with one answer."""
    return "".join([chunk.text async for chunk in call])


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    """The error that ends a call; fails if it ends well."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call ended without an error")


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The google.rpc.Status that travels with an error."""
    trailer = dict(error.trailing_metadata() or ())
    return status_pb2.Status.FromString(trailer["grpc-status-details-bin"])


def blamed_field(error: grpc.aio.AioRpcError) -> str:
    """The field that a BadRequest detail names."""
    for detail in status_of(error).details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            (violation,) = bad_request.field_violations
            assert violation.description == error.details()
            return str(violation.field)
    raise AssertionError("no BadRequest detail")
