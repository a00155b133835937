"""Clients that flood, cancel, send too much, do not read, or have no time: they are bounded, others go on.

Fault 45 (deadlines of 1 ms, cancels, pings, resets, large messages), and ids and log lines of calls.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from servd.api.grpc._pb.inference import grpc_service_pb2_grpc as kserve_grpc
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.config import ServerConfig
from tests.api.grpc.grpc_helpers import Served, blamed_field, error_of, run, served, text_of
from tests.api.grpc.kserve_helpers import request_of

Code = grpc.StatusCode
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


SETTINGS = frame(4, 0, 0, b"")
PING = frame(6, 0, 0, b"12345678")
RESET = 3
GOAWAY = 7
ENHANCE_YOUR_CALM = 11


async def canary_with(s: Served, disturbance: Any) -> None:
    """Run a disturbance beside a stream whose text must be as it is alone."""
    alone = await text_of(s.generate("canary", temperature=0.0, max_tokens=200))
    canary = asyncio.create_task(text_of(s.generate("canary", temperature=0.0, max_tokens=200)))
    await disturbance
    assert await canary == alone
    await s.fake.wait_idle()


def test_deadlines_of_a_millisecond_leave_nothing_running(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"step_delay": 0.001}) as s:

            async def hurry() -> None:
                for _ in range(20):
                    calls = [s.generate(max_tokens=1500, timeout=0.001) for _ in range(10)]
                    errors = await asyncio.gather(*(error_of(call) for call in calls))
                    assert {error.code() for error in errors} == {Code.DEADLINE_EXCEEDED}

            await canary_with(s, hurry())

    run(test)


def test_ten_thousand_cancels_leave_nothing_running(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"step_delay": 0.001}) as s:

            async def cancel() -> None:
                for _ in range(100):
                    calls = [s.generate(max_tokens=1500) for _ in range(100)]
                    await asyncio.sleep(0.01)
                    for call in calls:
                        call.cancel()

            await canary_with(s, cancel())

    run(test)


async def goaway_after(port: int, flood: bytes, rounds: int) -> int:
    """Send a flood until the server says GOAWAY; its error code."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(PREFACE + SETTINGS)
    received = b""
    try:
        async with asyncio.timeout(20):
            for _ in range(rounds):
                writer.write(flood)
                await writer.drain()
                try:
                    received += await asyncio.wait_for(reader.read(65536), 0.02)
                except TimeoutError:
                    continue
                while len(received) >= 9:
                    length = int.from_bytes(received[:3], "big")
                    if len(received) < 9 + length:
                        break
                    if received[3] == GOAWAY:
                        return int.from_bytes(received[13:17], "big")
                    received = received[9 + length :]
    except ConnectionError:
        return -1
    finally:
        writer.close()
    raise AssertionError("the server took all of it")


def test_a_flood_of_pings_is_sent_away(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:

            async def flood() -> None:
                assert await goaway_after(s.server.port, PING * 100, 200) in (ENHANCE_YOUR_CALM, -1)

            await canary_with(s, flood())

    run(test)


def headers_of_generate(stream: int) -> bytes:
    """HEADERS of a call, as literals without indexing (RFC 7541, section 6.2.2)."""
    fields = {
        ":method": "POST", ":scheme": "http", ":path": "/servd.v1.Inference/Generate", ":authority": "x",
        "content-type": "application/grpc", "te": "trailers",
    }  # fmt: skip
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    return frame(1, 4, stream, block)


def test_a_flood_of_resets_disturbs_nobody(tmp_path: Path) -> None:
    message = pb.GenerateRequest(text="x", sampling_params=pb.SamplingParams(max_tokens=1500)).SerializeToString()
    data = b"\0" + struct.pack(">I", len(message)) + message

    async def test() -> None:
        async with served(tmp_path) as s:

            async def flood() -> None:
                reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
                writer.write(PREFACE + SETTINGS)
                try:
                    for i in range(2000):
                        stream = 2 * i + 1
                        reset = frame(RESET, 0, stream, struct.pack(">I", 8))
                        writer.write(headers_of_generate(stream) + frame(0, 1, stream, data) + reset)
                        if i % 50 == 0:
                            await writer.drain()
                            await asyncio.sleep(0)
                    await asyncio.sleep(0.2)
                except ConnectionError:
                    pass  # sent away: also right
                finally:
                    writer.close()

            await canary_with(s, flood())

    run(test)


def test_a_message_of_five_megabytes_is_refused_by_a_server_that_takes_four(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, server_config=ServerConfig(grpc_port=0, max_body_bytes=4 << 20)) as s:

            async def send() -> None:
                for method, request in (
                    (s.stub.Tokenize, pb.TokenizeRequest(text="x" * (5 << 20))),
                    (s.stub.Generate, pb.GenerateRequest(text="x" * (5 << 20))),
                ):
                    assert (await error_of(method(request))).code() == Code.RESOURCE_EXHAUSTED

            await canary_with(s, send())

    run(test)


def test_a_client_that_never_reads_is_cut_off(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, write_timeout=0.3, max_position_embeddings=30_000, executor_options={
            "num_blocks": 2001
        }) as s:  # fmt: skip
            call = s.generate(max_tokens=29_000, logprobs=20)  # far more than flow control lets through
            await call.read()
            await s.fake.wait_until(lambda: s.fake.engine.stats().running == 1)
            await s.fake.wait_until(lambda: s.fake.engine.stats().running == 0, 30.0)
            await s.fake.wait_idle()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert error.value.code() == Code.DEADLINE_EXCEEDED
            assert "unread for 0.3 s" in str(error.value.details())

    run(test)


def test_a_stream_of_many_requests_that_is_never_read_is_cut_off(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, write_timeout=0.3, max_position_embeddings=30_000, executor_options={
            "num_blocks": 4001
        }) as s:  # fmt: skip
            small = [("grpc.http2.bdp_probe", 0)]  # a window that does not grow
            async with grpc.aio.insecure_channel(f"127.0.0.1:{s.server.port}", options=small) as channel:
                call = kserve_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
                for _ in range(60):  # replies hold their prompts
                    await call.write(request_of("x" * 25_000, max_tokens=1))
                await call.write(request_of(flags={"stream": True}, max_tokens=29_000, ignore_eos=True))
                await s.fake.wait_until(lambda: s.fake.engine.stats().running > 0)
                for _ in range(3):  # the engine is also idle for a moment between two of the requests
                    await s.fake.wait_idle(30.0)
                    await asyncio.sleep(0.5)
                with pytest.raises(grpc.aio.AioRpcError, match=r"unread for 0\.3 s"):
                    async with asyncio.timeout(30):
                        while await call.read() is not grpc.aio.EOF:
                            pass

    run(test)


def test_log_probabilities_of_a_long_prompt_come_in_messages_that_clients_take(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, max_position_embeddings=12_000, executor_options={"num_blocks": 800}) as s:
            entries = []
            async for chunk in s.generate("abcde" * 2000, max_tokens=2, prompt_logprobs=20):  # about 6 MB in all
                assert chunk.ByteSize() < 4 << 20
                entries += [entry.token for entry in chunk.prompt_logprobs]
            assert "".join(entries) == ("abcde" * 2000)[1:]

    run(test)


def test_a_request_can_be_aborted_by_its_id(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"step_delay": 0.002}) as s:
            call = s.stub.Generate(
                pb.GenerateRequest(text="x", request_id="mine", sampling_params=pb.SamplingParams(max_tokens=1500))
            )
            assert (await call.read()).request_id == "mine"
            twice = await error_of(s.stub.Generate(pb.GenerateRequest(text="x", request_id="mine")))
            assert (twice.code(), blamed_field(twice)) == (Code.INVALID_ARGUMENT, "request_id")
            assert (await s.stub.Abort(pb.AbortRequest(request_id="mine"))).aborted
            with pytest.raises(grpc.aio.AioRpcError) as error:
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert (error.value.code(), error.value.details()) == (Code.UNAVAILABLE, "the request was aborted")
            await s.fake.wait_idle()
            assert not (await s.stub.Abort(pb.AbortRequest(request_id="mine"))).aborted
            assert await text_of(s.stub.Generate(pb.GenerateRequest(text="x", request_id="mine")))

    run(test)


@pytest.mark.parametrize("offered, echoed", [("abc-1.2_3", True), ("two words", False), ("x" * 200, False)])
def test_the_id_of_a_call_comes_back(offered: str, echoed: bool, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            calls = [
                s.stub.Generate(pb.GenerateRequest(text="x"), metadata=[("x-request-id", offered)]),
                s.stub.GetStatus(pb.GetStatusRequest(), metadata=[("x-request-id", offered)]),
            ]
            for call in calls:
                request_id = dict(await call.initial_metadata())["x-request-id"]
                assert (request_id == offered) is echoed
                assert request_id

    run(test)


def test_the_log_has_a_line_a_call_and_no_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            with caplog.at_level(logging.INFO, logger="servd.grpc"):
                await text_of(
                    s.stub.Generate(pb.GenerateRequest(text="secret"), metadata=[("x-request-id", "id-1")])
                )
                await error_of(s.stub.Generate(pb.GenerateRequest(model="secret", text="secret")))
                call = s.generate("secret", max_tokens=1500)
                await call.read()
                call.cancel()
                await s.fake.wait_idle()
            lines = [record.getMessage() for record in caplog.records if record.name == "servd.grpc"]
            assert ["OK" in lines[0], "NOT_FOUND" in lines[1], "CANCELLED" in lines[2]] == [True] * 3
            assert all(line.startswith("/servd.v1.Inference/Generate ") for line in lines)
            assert lines[0].endswith(" anonymous id-1")
            assert "secret" not in caplog.text

    run(test)


def test_metadata_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            metadata = [("x-filler", "x" * 100_000)]
            error = await error_of(s.stub.GetStatus(pb.GetStatusRequest(), metadata=metadata))
            assert error.code() == Code.RESOURCE_EXHAUSTED
            assert (await s.stub.GetStatus(pb.GetStatusRequest())).state == pb.ENGINE_STATE_READY

    run(test)
