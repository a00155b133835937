"""Responses made in the background, and what is kept of them: followed, cancelled, bounded, apart by tenant."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from servd.api.http.responses.answer import ResponseAnswer
from servd.api.http.responses.store import BackgroundRun, ResponseNotFoundError, ResponseStore, StoredResponse
from servd.engine.result_stream import ResultStream
from servd.errors import OverloadedError
from tests.api.http.serving import Reply, Served
from tests.api.http.test_disconnect import head_and_body
from tests.api.http.test_responses import ASK, PATH, REPLIES, checked, named_events, respond, run, text_of

LONG: dict[str, Any] = {"model": "fake", "input": "no end", "background": True}


async def finished(server: Served, response_id: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            reply = checked(await server.request("GET", f"{PATH}/{response_id}"))
            if reply["status"] not in ("queued", "in_progress"):
                return reply
            await asyncio.sleep(0.005)


def test_it_is_made_without_a_client(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        server.executor.gate.clear()
        made = await respond(server, background=True)
        assert (made["status"], made["output"], made["background"]) == ("queued", [], True)
        server.executor.gate.set()
        done = await finished(server, made["id"])
        assert (done["status"], text_of(done)) == ("completed", REPLIES["greet"])
        for number in (-1, 0, 3):
            after = "" if number < 0 else f"&starting_after={number}"
            events = named_events(await server.request("GET", f"{PATH}/{made['id']}?stream=true{after}"), number + 1)
            assert events[-1]["response"] == done
        assert [event["type"] for event in named_events(
            await server.request("GET", f"{PATH}/{made['id']}?stream=true")
        )][:3] == ["response.created", "response.queued", "response.in_progress"]  # fmt: skip
        late = await server.request("GET", f"{PATH}/{made['id']}?stream=true&starting_after=999")
        assert (late.status, late.error()["param"]) == (400, "starting_after")

    run(tmp_path, main)


def test_a_client_that_leaves_its_stream_comes_back_to_it(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        body = ASK | {"input": "no end", "max_output_tokens": 60, "background": True, "stream": True}
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head_and_body(PATH, body))
        seen = await reader.readuntil(b'"sequence_number":6')
        writer.close()
        response_id = seen.partition(b'"id":"')[2].partition(b'"')[0].decode()
        events = named_events(await server.request("GET", f"{PATH}/{response_id}?stream=true&starting_after=6"), 7)
        done = await finished(server, response_id)
        assert events[-1]["response"] == done and len(text_of(done)) == 60

    run(tmp_path, main, step_delay=0.002)


@pytest.mark.parametrize("method", ["cancel", "delete"])
def test_it_can_be_ended(tmp_path: Path, method: str) -> None:
    async def main(server: Served) -> None:
        made = await respond(server, **LONG)
        path = f"{PATH}/{made['id']}"
        await server.fake.wait_until(lambda: server.engine.stats().running == 1)
        following = await server.session.get(f"{server.url}{path}?stream=true")
        if method == "cancel":
            ended = checked(await server.request("POST", f"{path}/cancel"))
            assert ended["status"] == "cancelled"
            assert checked(await server.request("POST", f"{path}/cancel")) == ended
            assert checked(await server.request("GET", path)) == ended
        else:
            assert (await server.request("DELETE", path)).status == 200
            assert (await server.request("GET", path)).status == 404
        await server.fake.wait_idle(seconds=2)
        last = named_events(Reply(following.status, following.headers, await following.read()))[-1]
        assert (last["type"], last["code"]) == ("error", "response_cancelled")

    run(tmp_path, main, step_delay=0.002)


def test_the_official_client_follows_and_cancels(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        async with server.openai() as client:
            last = 0
            async with client.responses.stream(model="fake", input="greet", background=True) as stream:
                async for event in stream:
                    if event.type == "response.created":
                        response_id = event.response.id
                    last = event.sequence_number
                    if last == 5:
                        break
            async with client.responses.stream(response_id=response_id, starting_after=last) as again:
                numbers = [event.sequence_number async for event in again]
                final = await again.get_final_response()
            assert numbers[0] == 6 and final.output_text == REPLIES["greet"]
            made = await client.responses.create(**LONG)
            cancelled = await client.responses.cancel(made.id)
            assert cancelled.status == "cancelled"

    run(tmp_path, main, step_delay=0.002)


def test_what_was_not_made_in_the_background_can_be_neither_followed_nor_cancelled(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        path = f"{PATH}/{(await respond(server))['id']}"
        followed = await server.request("GET", f"{path}?stream=true")
        assert (followed.status, followed.error()["param"]) == (400, "stream")
        assert (await server.request("POST", f"{path}/cancel")).error()["param"] == "response_id"

    run(tmp_path, main)


def test_a_server_that_stops_ends_what_it_makes(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        made = await respond(server, **LONG)
        await server.engine.drain(0.05)
        failed = await finished(server, made["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")

    run(tmp_path, main, step_delay=0.002)


def stored(response_id: str, size: int = 100) -> StoredResponse:
    return StoredResponse(response_id, None, b"[]", reply=b"x" * size)


def kept(store: ResponseStore, tenant: str, *response_ids: str) -> list[bool]:
    found = []
    for response_id in response_ids:
        try:
            found.append(store.get(tenant, response_id).id == response_id)
        except ResponseNotFoundError:
            found.append(False)
    return found


def test_the_oldest_go_first_and_tenants_are_apart() -> None:
    store = ResponseStore(max_responses=2)
    for response_id in "abc":
        store.add("t", stored(response_id))
    store.add("u", stored("d"))
    assert kept(store, "t", "a", "b", "c", "d") == [False, True, True, False]
    assert kept(store, "u", "a", "b", "c", "d") == [False, False, False, True]
    store = ResponseStore(max_bytes=250)
    for response_id in "abc":
        store.add("t", stored(response_id))
    assert kept(store, "t", "a", "b", "c") == [False, True, True]
    with pytest.raises(OverloadedError):
        store.add("t", stored("d", 300))


def test_the_old_are_dropped() -> None:
    store = ResponseStore(max_age=60)
    store.add("t", stored("a"))
    store.add("t", stored("b"))
    store.get("t", "a").stored_at = time.monotonic() - 61
    assert kept(store, "t", "a", "b") == [False, True]
    store.get("t", "b").stored_at = time.monotonic() - 61
    store.add("u", stored("c"))  # a tenant that does not come any more holds nothing for ever
    store.max_age = 1000.0
    assert kept(store, "t", "a", "b") == [False, False] and kept(store, "u", "c") == [True]


def test_what_runs_is_never_dropped() -> None:
    async def main() -> None:
        store = ResponseStore(max_responses=1)
        running = stored("a")
        running.run = BackgroundRun(ResponseAnswer({"id": "resp_a", "store": True}), ResultStream(1, lambda: None), "t")
        store.add("t", running)
        store.add("t", stored("b"))
        assert kept(store, "t", "a", "b") == [True, False]

    with pytest.raises(OverloadedError):
        asyncio.run(main())
