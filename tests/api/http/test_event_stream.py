"""Event streams: ids, comments that keep them alive, going on after a lost connection, within bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from servd.api.http import resumable_streams
from servd.api.http.resumable_streams import EventSource, ReaderLostError, ResumableStreams
from servd.config import ServerConfig
from servd.errors import InvalidRequestError, NotFoundError, OverloadedError
from tests.api.http.serving import CHAT, COMPLETIONS, Served, serve

BODY: dict[str, Any] = {
    "prompt": "a stream", "max_tokens": 60, "temperature": 0, "stream": True, "ignore_eos": True,
    "stream_options": {"resumable": True, "include_usage": True},
}  # fmt: skip


MESSAGES = [{"role": "user", "content": "a"}]
# Answers of about 2000 tokens, streamed.
ROUTES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}),
    (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "max_tokens": 2000, "ignore_eos": True, "stream": True}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1900, "ignore_eos": True, "stream": True}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 1900, "ignore_eos": True, "stream": True}),
]


def ids_of(data: bytes) -> list[str]:
    return [line.removeprefix("id: ") for line in data.decode().splitlines() if line.startswith("id: ")]


def text_of(data: bytes) -> str:
    chunks = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def read_some(server: Served, num_events: int, **body: Any) -> bytes:
    """The first events of a call; then the connection is dropped, in the middle of whatever it was sending."""
    session = aiohttp.ClientSession()
    received = b""
    try:
        async with session.post(server.url + COMPLETIONS, json=BODY | body) as response:
            assert response.status == 200, await response.read()
            while received.count(b"\n\n") < num_events:
                received += await response.content.readany()
    finally:
        await session.close()
    return received[: received.rindex(b"\n\n") + 2]


@pytest.mark.parametrize(
    ("path", "body"),
    [(COMPLETIONS, {"prompt": "x"}), (COMPLETIONS, {"prompt": ["x", "y"], "n": 2}),
     (CHAT, {"messages": [{"role": "user", "content": "x"}]})],
)  # fmt: skip
def test_each_event_has_an_id_that_counts(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            reply = await server.post(path, body | {"stream": True, "max_tokens": 9})
            first = reply.events()[0]
            assert ids_of(reply.body) == [f"{first['id']}:{i + 1}" for i in range(len(reply.events()))]

    asyncio.run(main())


@pytest.mark.parametrize("by_get", [False, True])
@pytest.mark.parametrize("num_events", [1, 10])
def test_a_stream_goes_on_where_the_client_lost_it(tmp_path: Path, num_events: int, by_get: bool) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.005) as server:
            whole = await server.post(COMPLETIONS, BODY)
            begun = await read_some(server, num_events)
            headers = {"Last-Event-ID": ids_of(begun)[-1]}
            if by_get:
                stream_id = ids_of(begun)[0].partition(":")[0]
                rest = await server.request("GET", f"/v1/streams/{stream_id}", headers=headers)
            else:
                rest = await server.post(COMPLETIONS, BODY, headers=headers)
            assert rest.status == 200
            assert text_of(begun + rest.body) == text_of(whole.body)
            assert ids_of(begun + rest.body)[0].endswith(":1")
            numbers = [int(i.rpartition(":")[2]) for i in ids_of(begun + rest.body)]
            assert numbers == list(range(1, len(numbers) + 1))
            assert rest.body.endswith(b"data: [DONE]\n\n")
            # It is still there, whole: the client may have lost the end as well.
            again = await server.request("GET", f"/v1/streams/{ids_of(begun)[0].partition(':')[0]}?after=0")
            assert again.body == begun + rest.body

    asyncio.run(main())


def test_nobody_comes_back_and_the_request_is_aborted(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=ServerConfig(port=0, resume_seconds=0.2), step_delay=0.002) as server:
            begun = await read_some(server, 3, max_tokens=2000)
            assert server.engine.stats().running == 1
            await server.fake.wait_idle(seconds=5)
            late = await server.post(COMPLETIONS, BODY, headers={"Last-Event-ID": ids_of(begun)[-1]})
            assert late.status == 404
            assert late.error()["param"] == "Last-Event-ID"

    asyncio.run(main())


def test_a_stream_that_did_not_ask_is_aborted_at_once_and_cannot_be_resumed(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.002) as server:
            begun = await read_some(server, 3, max_tokens=2000, stream_options={})
            await server.fake.wait_idle(seconds=2)
            late = await server.post(COMPLETIONS, BODY, headers={"Last-Event-ID": ids_of(begun)[-1]})
            assert late.status == 404
            assert "stream_options.resumable" in late.error()["message"]

    asyncio.run(main())


@pytest.mark.parametrize("event_id", ["x", "x:", ":1", "x:-1", "x:1.5", "x:٣", "x:" + "9" * 5000])
def test_a_malformed_event_id_is_refused(tmp_path: Path, event_id: str) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            reply = await server.post(COMPLETIONS, BODY, headers={"Last-Event-ID": event_id})
            assert reply.status == 400
            assert reply.error()["param"] == "Last-Event-ID"

    asyncio.run(main())


def test_an_event_that_was_not_sent_yet_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            stream_id = (await server.post(COMPLETIONS, BODY)).events()[0]["id"]
            reply = await server.request("GET", f"/v1/streams/{stream_id}?after=5000")
            assert reply.status == 400
            assert "kept here: events 1 to" in reply.error()["message"]

    asyncio.run(main())


def test_a_server_without_resuming_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        config = ServerConfig(port=0, resume_seconds=0)
        async with serve(tmp_path, server=config, step_delay=0.02) as server:  # 2000 tokens are 40 s: longer than
            for path, body in ROUTES:  # `serve` waits in the end for what still runs
                reply = await server.post(path, body | {"stream_options": {"resumable": True}})
                assert reply.status == 400
                assert reply.error()["param"] == "stream_options.resumable"

    asyncio.run(main())


def test_an_error_in_mid_stream_is_kept_like_any_event(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.005) as server:
            begun = await read_some(server, 3, max_tokens=2000, deadline_ms=300)
            rest = await server.post(COMPLETIONS, BODY, headers={"Last-Event-ID": ids_of(begun)[-1]})
            assert b'"code":"deadline_exceeded"' in rest.body.splitlines()[-2]
            assert ids_of(rest.body)

    asyncio.run(main())


def test_a_resumable_stream_ends_with_the_server(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.002) as server:
            await read_some(server, 3, max_tokens=2000)
            await server.runner.shutdown()
            await server.fake.wait_idle(seconds=5)

    asyncio.run(main())


def test_a_stream_that_waits_is_kept_alive_by_comments(tmp_path: Path) -> None:
    async def main() -> None:
        config = ServerConfig(port=0, sse_keep_alive=0.05)
        async with serve(tmp_path, server=config, settings={"max_num_seqs": 1}, step_delay=0.01) as server:
            first = asyncio.create_task(server.post(COMPLETIONS, BODY))
            await server.fake.wait_until(lambda: server.engine.stats().running == 1)
            waits = await server.post(COMPLETIONS, BODY)
            assert waits.body.startswith(b": keep-alive\n\n: keep-alive\n\n")
            assert text_of(waits.body) == text_of((await first).body)
            async with server.openai() as client:
                stream = await client.completions.create(model="fake", prompt="a stream", max_tokens=9, stream=True)
                assert len([chunk async for chunk in stream]) > 0

    asyncio.run(main())


@asynccontextmanager
async def kept(*events: bytes, **options: Any) -> AsyncIterator[tuple[ResumableStreams, AsyncGenerator[bytes, None]]]:
    """Streams with one, 's' of tenant 't', whose events are all there."""
    streams = ResumableStreams(options.get("seconds", 30), options.get("max_bytes", 1 << 20))

    async def source() -> EventSource:
        for event in events:
            yield [event]

    log = streams.start("s", "t", source())
    reader = log.after(0)
    await asyncio.sleep(0.01)
    async with aclosing(reader):
        yield streams, reader
    await streams.close()


def test_another_tenant_finds_nothing() -> None:
    async def main() -> None:
        async with kept(b"data: 1\n\n") as (streams, _):
            with pytest.raises(NotFoundError):
                streams.resume("s:0", "other")
            assert [piece async for piece in streams.resume("s:0", "t")] == [b"id: s:1\ndata: 1\n\n"]

    asyncio.run(main())


def test_a_new_reader_takes_the_place_of_the_old_one() -> None:
    async def main() -> None:
        streams = ResumableStreams(30, 1 << 20)
        go_on = asyncio.Event()

        async def source() -> EventSource:
            yield [b"data: 1\n\n"]
            await go_on.wait()
            yield [b"data: 2\n\n"]

        old = streams.start("s", "t", source()).after(0)
        assert await anext(old) == b"id: s:1\ndata: 1\n\n"
        waiting = asyncio.create_task(anext(old))
        await asyncio.sleep(0)
        new = streams.resume("s:1", "t")
        going_on = asyncio.create_task(anext(new))
        with pytest.raises(ReaderLostError):
            await waiting
        go_on.set()
        assert await going_on == b"id: s:2\ndata: 2\n\n"
        await new.aclose()
        await streams.close()

    asyncio.run(main())


def test_the_oldest_events_go_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable_streams, "STREAM_BYTES", 1000)

    async def main() -> None:
        async with kept(*(b"data: %d\n\n" % i for i in range(1, 201))) as (streams, slow):
            with pytest.raises(ReaderLostError):
                await anext(slow)
            with pytest.raises(InvalidRequestError, match="kept here: events 1[0-9]+ to 200"):
                streams.resume("s:0", "t")
            assert [piece async for piece in streams.resume("s:199", "t")] == [b"id: s:200\ndata: 200\n\n"]

    asyncio.run(main())


def test_too_many_kept_bytes_refuse_new_streams_not_old_ones() -> None:
    async def main() -> None:
        async with kept(b"data: " + b"x" * 200 + b"\n\n", max_bytes=100) as (streams, reader):

            async def source() -> EventSource:
                yield [b""]

            refused = source()
            with pytest.raises(OverloadedError):
                streams.start("new", "t", refused)
            await refused.aclose()
            assert len([piece async for piece in reader]) == 1

    asyncio.run(main())
