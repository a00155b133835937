"""Clients that go away or stop reading: their requests end, their blocks are free, others notice nothing."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.api.http.serving import CHAT, COMPLETIONS, Served, serve

LONG: dict[str, Any] = {"prompt": "long", "max_tokens": 2000, "ignore_eos": True}
LONG_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "long"}], "ignore_eos": True}
CASES = [
    (COMPLETIONS, LONG),
    (COMPLETIONS, LONG | {"stream": True}),
    (COMPLETIONS, LONG | {"n": 4}),
    (COMPLETIONS, LONG | {"n": 4, "stream": True}),
    (COMPLETIONS, LONG | {"prompt": ["long", "longer", "longest"]}),
    (COMPLETIONS, LONG | {"prompt": ["long", "longer", "longest"], "n": 2, "stream": True}),
    (CHAT, LONG_CHAT),
    (CHAT, LONG_CHAT | {"stream": True}),
]


def head_and_body(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


@pytest.mark.parametrize(("path", "body"), CASES)
def test_a_client_that_goes_away_frees_its_request(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.002) as server:
            stats = server.engine.stats
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head_and_body(path, body))
            num_answers = body.get("n", 1) * (len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1)
            await server.fake.wait_until(lambda: stats().running == num_answers)
            assert stats().kv_blocks_used > 0
            writer.close()
            await server.fake.wait_idle(seconds=2)
            assert b'servd_kv_blocks{state="used"} 0.0' in (await server.request("GET", "/metrics")).body

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_before_its_turn_leaves_the_queue(tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        async with serve(tmp_path, settings={"max_num_seqs": 1}, step_delay=0.002) as server:
            first = asyncio.create_task(server.post(COMPLETIONS, LONG | {"max_tokens": 200}))
            await server.fake.wait_until(lambda: server.engine.stats().running == 1)
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head_and_body(COMPLETIONS, LONG | {"stream": stream}))
            await server.fake.wait_until(lambda: server.engine.stats().waiting == 1)
            writer.close()
            await server.fake.wait_until(lambda: server.engine.stats().waiting == 0, seconds=1)
            assert len((await first).json()["choices"][0]["text"]) == 200

    asyncio.run(main())


def test_the_openai_client_can_close_a_stream(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.002) as server, server.openai() as client:
            stream = await client.completions.create(model="fake", prompt="x", max_tokens=2000, stream=True)
            async for _ in stream:
                break
            await stream.close()
            await server.fake.wait_idle(seconds=2)

    asyncio.run(main())


def test_two_hundred_cancels_leave_nothing_and_a_canary_is_unchanged(tmp_path: Path) -> None:
    async def cancel_soon(server: Served, choice: random.Random) -> None:
        path, body = choice.choice(CASES)
        with pytest.raises((TimeoutError, aiohttp.ClientError)):
            async with asyncio.timeout(choice.uniform(0.005, 0.1)):
                reply = await server.post(path, body)
                assert reply.status in (200, 429)
                raise TimeoutError

    async def main() -> None:
        async with serve(tmp_path, step_delay=0.001, num_blocks=600) as server:
            canary = {"prompt": "canary", "max_tokens": 300, "temperature": 0}
            expected = (await server.post(COMPLETIONS, canary)).json()["choices"]
            beside = asyncio.create_task(server.post(COMPLETIONS, canary))
            choice = random.Random(1)
            for _ in range(10):
                await asyncio.gather(*(cancel_soon(server, choice) for _ in range(20)))
            assert (await beside).json()["choices"] == expected
            await server.fake.wait_idle()

    asyncio.run(main())


def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, max_position_embeddings=200_000, num_blocks=2000, write_timeout=0.3) as server:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", server.port))
                # Log-probabilities make its events far larger than what the socket buffers hold.
                body = LONG | {"max_tokens": 30_000, "stream": True, "logprobs": 20, "n": 4}
                client.sendall(head_and_body(COMPLETIONS, body))
                await server.fake.wait_until(lambda: server.engine.stats().running == 4)
                other = await server.post(COMPLETIONS, LONG | {"max_tokens": 20})
                assert other.status == 200
                await server.fake.wait_idle(seconds=20)

    asyncio.run(main())


def test_a_whole_reply_is_not_kept_for_ever_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, max_position_embeddings=20_000, num_blocks=2000, write_timeout=0.3) as server:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", server.port))
                body = LONG | {"max_tokens": 15_000, "logprobs": 20}
                client.sendall(head_and_body(COMPLETIONS, body))
                connections = server.connections
                await server.fake.wait_until(lambda: server.engine.stats().running == 1)
                await server.fake.wait_until(lambda: connections() == 0, seconds=30)

    asyncio.run(main())


def test_a_slow_reader_gets_everything(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, max_position_embeddings=20_000, num_blocks=2000) as server:
            body = LONG | {"max_tokens": 3000, "temperature": 0}
            expected = (await server.post(COMPLETIONS, body)).json()["choices"][0]["text"]
            received = bytearray()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2048)
            writer.write(head_and_body(COMPLETIONS, body | {"stream": True}))
            while not received.endswith(b"\r\n0\r\n\r\n"):
                received += await reader.read(8192)
                await asyncio.sleep(0.002)
            writer.close()
            events = [line[6:] for line in received.decode().splitlines() if line.startswith("data: {")]
            assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected

    asyncio.run(main())
