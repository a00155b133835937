"""GET /v1/requests and /v1/requests/{id} over the fakes: ids as clients saw them, and only for their own tenant."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from servd.api.access import Caller, set_caller
from servd.api.service import InferenceService
from servd.engine.request_log import UnknownRequestError
from servd.sampling_params import SamplingParams
from tests.api.http.serving import CHAT, COMPLETIONS, serve

REQUESTS = "/v1/requests"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}


def test_a_request_is_found_by_its_answers_id_and_by_x_request_id(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            reply = await served.post(CHAT, BODY, headers={"X-Request-Id": "mine-1"})
            by_id = (await served.request("GET", f"{REQUESTS}/{reply.json()['id']}")).json()
            by_header = (await served.request("GET", f"{REQUESTS}/mine-1")).json()
            assert by_id["answers"] == by_header["answers"]
            assert (by_id["object"], by_id["state"]) == ("request", "finished")
            (answer,) = by_id["answers"]
            usage = reply.json()["usage"]
            assert answer["output_tokens"] == usage["completion_tokens"] == 5
            assert answer["prompt_tokens"] == usage["prompt_tokens"]

    asyncio.run(scenario())


def test_all_prompts_of_a_call_are_shown_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            reply = await served.post(COMPLETIONS, {"prompt": ["a", "bc"], "n": 2, "max_tokens": 3})
            found = (await served.request("GET", f"{REQUESTS}/{reply.json()['id']}")).json()
            shown = [(a["prompt"], a["index"], a["prompt_tokens"]) for a in found["answers"]]
            assert shown == [(0, 0, 1), (0, 1, 1), (1, 0, 2), (1, 1, 2)]

    asyncio.run(scenario())


def test_a_running_request_tells_where_it_stands(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            served.executor.gate.clear()
            task = asyncio.create_task(served.post(CHAT, BODY, headers={"X-Request-Id": "r"}))
            await served.fake.wait_until(lambda: served.engine.stats().running == 1)
            found = (await served.request("GET", f"{REQUESTS}/r")).json()
            assert found["state"] == "running" and found["answers"][0]["finish_reason"] is None
            listed = (await served.request("GET", REQUESTS, params={"state": "running"})).json()
            assert [entry["state"] for entry in listed["data"]] == ["running"]
            assert (await served.request("GET", REQUESTS, params={"state": "finished"})).json()["data"] == []
            served.executor.gate.set()
            assert (await task).status == 200
            (entry,) = (await served.request("GET", REQUESTS)).json()["data"]
            assert (entry["id"], entry["state"]) == ((await task).json()["id"], "finished")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        (f"{REQUESTS}/unknown", 404, "id"),
        (f"{REQUESTS}?state=done", 400, "state"),
        (f"{REQUESTS}?limit=0", 400, "limit"),
        (f"{REQUESTS}?limit=99999", 400, "limit"),
        (f"{REQUESTS}?limit=x", 400, "limit"),
        (f"{REQUESTS}?page=2", 400, "page"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, path: str, status: int, param: str) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            reply = await served.request("GET", path)
            assert (reply.status, reply.error()["param"]) == (status, param)

    asyncio.run(scenario())


def test_other_tenants_see_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            service = InferenceService(served.engine, "fake")
            set_caller(Caller("a", tenant="one"))
            async with service.generate([1, 2], SamplingParams(max_tokens=2), request_id="r") as stream:
                assert [output async for output in stream]
            assert service.describe_request("r")["state"] == "finished"
            set_caller(Caller("b", tenant="two"))
            with pytest.raises(UnknownRequestError):
                service.describe_request("r")
            assert service.list_requests() == []
            assert (await served.request("GET", f"{REQUESTS}/r")).status == 404

    asyncio.run(scenario())


def test_a_client_that_reads_its_stream_late_is_to_blame(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path, max_position_embeddings=20_000, num_blocks=2000) as served:
            # Log-probabilities make its events far larger than what the socket buffers hold.
            body = json.dumps({"prompt": "x", "max_tokens": 15_000, "stream": True, "logprobs": 20}).encode()
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: late\r\n"
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", served.port))
            reader, writer = await asyncio.open_connection(sock=client, limit=2048)
            writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            await served.fake.wait_until(lambda: served.engine.stats().running == 1)
            await served.fake.wait_idle(seconds=30)
            await asyncio.sleep(0.1)
            received = bytearray()
            while not received.endswith(b"\r\n0\r\n\r\n"):
                received = received[-16:] + await reader.read(1 << 20)
            writer.close()
            (answer,) = (await served.request("GET", f"{REQUESTS}/late")).json()["answers"]
            assert (answer["finish_reason"], answer["stalls"][-1]["cause"]) == ("length", "client_not_reading")
            assert answer["unread_seconds"] > 0.1

    asyncio.run(scenario())
