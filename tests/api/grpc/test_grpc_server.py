"""Health, reflection, API key and the address: what surrounds the calls."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from servd.api.grpc._pb.inference import grpc_service_pb2 as kserve
from servd.api.grpc._pb.inference import grpc_service_pb2_grpc as kserve_grpc
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc.server import KSERVE_NAME, SERVICE_NAME, start_grpc
from servd.config import ServerConfig
from servd.errors import ConfigError
from tests.api.grpc.grpc_helpers import MODEL, Served, error_of, run, served, text_of

Health = health_pb2.HealthCheckResponse
CONFIG_WITH_KEY = ServerConfig(grpc_port=0, api_key="s3cret")


async def health_of(s: Served, service: str) -> int:
    reply = await health_pb2_grpc.HealthStub(s.channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(reply.status)


@pytest.mark.parametrize("service", ["", SERVICE_NAME, KSERVE_NAME])
def test_health_follows_the_engine(service: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            assert await health_of(s, service) == Health.SERVING
            for state, status in (("starting", Health.NOT_SERVING), ("ready", Health.SERVING)):
                s.fake.engine.state = state
                async with asyncio.timeout(30):
                    while await health_of(s, service) != status:
                        await asyncio.sleep(0.02)
            await s.server.report_not_serving()
            assert await health_of(s, service) == Health.NOT_SERVING
            assert len(await text_of(s.generate(max_tokens=2))) == 2

    run(test)


def test_health_of_an_unknown_service_is_not_found(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await health_of(s, "nobody")
            assert error.value.code() == grpc.StatusCode.NOT_FOUND

    run(test)


def test_health_can_be_watched(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            watch = health_pb2_grpc.HealthStub(s.channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == Health.SERVING
            s.fake.engine.state = "draining"
            assert (await watch.read()).status == Health.NOT_SERVING
            watch.cancel()

    run(test)


async def reflect(s: Served, **query: Any) -> Any:
    stub = reflection_pb2_grpc.ServerReflectionStub(s.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**query)]))
    return await call.read()


def test_reflection_describes_the_service(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            listed = await reflect(s, list_services="")
            names = {service.name for service in listed.list_services_response.service}
            standard = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
            assert names >= {SERVICE_NAME, KSERVE_NAME} | standard
            found = await reflect(s, file_containing_symbol=SERVICE_NAME)
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in found.file_descriptor_response.file_descriptor_proto
            ]
            (proto,) = (file for file in files if file.package == "servd.v1")
            assert proto.name == "servd/v1/inference.proto"
            assert {method.name for method in proto.service[0].method} == {
                "Generate", "Chat", "Abort", "Embed", "CreatePrefix", "ListPrefixes", "GetPrefix", "DeletePrefix",
                "GetRequestRecord", "ListRequestRecords", "Tokenize", "Detokenize", "ListModels", "GetStatus",
            }  # fmt: skip

    run(test)


@pytest.mark.parametrize(
    ("metadata", "passes"),
    [
        ([], False),
        ([("authorization", "Bearer s3cret")], True),
        ([("x-api-key", "s3cret")], True),
        ([("authorization", "Bearer wrong")], False),
        ([("authorization", "Basic s3cret")], False),
        ([("authorization", "s3cret")], False),
        ([("x-api-key", "")], False),
        ([("x-api-key", "s3cret2")], False),
        ([("other", "s3cret")], False),
    ],
)
def test_a_key_is_asked_for(metadata: list[tuple[str, str]], passes: bool, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, server_config=CONFIG_WITH_KEY) as s:
            calls = [
                s.stub.Generate(pb.GenerateRequest(text="x"), metadata=metadata),
                s.stub.GetStatus(pb.GetStatusRequest(), metadata=metadata),
            ]
            if passes:
                assert len(await text_of(calls[0])) == 16
                assert (await calls[1]).state == pb.ENGINE_STATE_READY
            else:
                for call in calls:
                    assert (await error_of(call)).code() == grpc.StatusCode.UNAUTHENTICATED

    run(test)


@pytest.mark.parametrize("key", [None, "wrong"])
def test_every_method_but_the_probes_wants_the_key(key: str | None, tmp_path: Path) -> None:
    services = [pb.DESCRIPTOR.services_by_name["Inference"]]
    services += [kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"]]
    paths = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    reflected = ["/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/servd.v1.Inference/NoSuchMethod"]
    probes = {f"/{KSERVE_NAME}/ServerLive", f"/{KSERVE_NAME}/ServerReady"}

    async def test() -> None:
        async with served(tmp_path, server_config=CONFIG_WITH_KEY) as s:
            metadata = [] if key is None else [("authorization", f"Bearer {key}")]
            for path in (*paths, *reflected):
                start: Any = s.channel.stream_stream(path)
                call = start(iter([b""]), metadata=metadata)
                with suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        pass
                expected = grpc.StatusCode.OK if path in probes else grpc.StatusCode.UNAUTHENTICATED
                assert await call.code() is expected, path
            assert len(paths) > 20 and not s.fake.engine.request_log.overview()

    run(test)


def test_without_the_key_health_answers_and_reflection_does_not(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, server_config=CONFIG_WITH_KEY) as s:
            assert await health_of(s, "") == Health.SERVING
            probes = kserve_grpc.GRPCInferenceServiceStub(s.channel)  # type: ignore[no-untyped-call]
            assert (await probes.ServerReady(kserve.ServerReadyRequest())).ready
            assert (await probes.ServerLive(kserve.ServerLiveRequest())).live
            guarded = await error_of(probes.ModelReady(kserve.ModelReadyRequest(name=MODEL)))
            assert guarded.code() == grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await reflect(s, list_services="")
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED

    run(test)


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            config = ServerConfig(grpc_port=s.server.port)
            with pytest.raises(ConfigError, match=f"--grpc-port is {s.server.port}: .*Address already in use"):
                await start_grpc(s.server.service, config)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
                with pytest.raises(ConfigError, match=f"--grpc-port is {port}"):
                    await start_grpc(s.server.service, ServerConfig(grpc_port=port))

    run(test)


def test_stop_lets_running_calls_finish(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"step_delay": 0.005}) as s:
            call = s.generate(max_tokens=30)
            await s.fake.wait_until(lambda: s.fake.engine.stats().running == 1)
            stopping = asyncio.create_task(s.server.stop(5.0))
            assert len(await text_of(call)) == 30
            await stopping

    run(test)
