"""/v1/prefixes over the fakes: what is pinned is found, stays, expires, and belongs to those who pinned it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from servd.api.access import ANONYMOUS, Caller, set_caller
from servd.api.service import InferenceService
from servd.engine.prefix_pins import UnknownPrefixError
from tests.api.http.serving import CHAT, COMPLETIONS, Served, serve

PREFIXES = "/v1/prefixes"
TEXT = "You are a helpful assistant who answers at length and in rhyme. " * 2  # 128 tokens: 8 blocks


async def pin(served: Served, **body: Any) -> dict[str, Any]:
    reply = await served.post(PREFIXES, body)
    assert reply.status == 200, reply.body
    found: dict[str, Any] = reply.json()
    return found


async def cached_tokens(served: Served, prompt: str, **body: Any) -> int:
    reply = await served.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 1, **body})
    assert reply.status == 200, reply.body
    count: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


async def fill_cache(served: Served) -> None:
    """Requests whose blocks push out all that is merely cached."""
    for i in range(6):
        reply = await served.post(COMPLETIONS, {"prompt": f"{i}" * 400, "max_tokens": 1})
        assert reply.status == 200


def test_a_pin_tells_what_it_holds(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            made = await pin(served, text=TEXT + "and", name="poet", ttl_seconds=60)
            assert made["id"].startswith("prefix-")
            assert (made["object"], made["name"], made["state"]) == ("prefix", "poet", "ready")
            assert (made["num_tokens"], made["num_blocks"], made["bytes"]) == (131, 8, 8 * 1024)
            assert made["expires_at"] - made["created_at"] in (60, 61)
            assert (await served.request("GET", f"{PREFIXES}/{made['id']}")).json() == made
            assert (await served.request("GET", PREFIXES)).json() == {"object": "list", "data": [made]}

    asyncio.run(scenario())


def test_a_pinned_prefix_outlives_what_is_merely_cached(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path, num_blocks=80, max_position_embeddings=512) as served:
            await pin(served, text=TEXT)
            await cached_tokens(served, "z" * 128)
            await fill_cache(served)
            assert await cached_tokens(served, "z" * 128 + "?") == 0
            assert await cached_tokens(served, TEXT + "And now?") == 128
            served.engine.core.scheduler.cache.check_integrity()

    asyncio.run(scenario())


@pytest.mark.parametrize("form", ["messages", "prompt_token_ids"])
def test_messages_and_token_ids_can_be_pinned(tmp_path: Path, form: str) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            system = {"role": "system", "content": TEXT}
            rendered = f"system: {TEXT}\n"
            await pin(served, **{form: [system] if form == "messages" else list(rendered.encode())})
            body = {"messages": [system, {"role": "user", "content": "hi"}], "max_tokens": 1}
            usage = (await served.post(CHAT, body)).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == len(rendered) // 16 * 16

    asyncio.run(scenario())


def test_a_deleted_pin_is_gone_but_its_blocks_may_still_be_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            made = await pin(served, text=TEXT)
            assert served.engine.stats().kv_blocks_pinned == 8
            reply = await served.request("DELETE", f"{PREFIXES}/{made['id']}")
            assert reply.json() == {"id": made["id"], "object": "prefix", "deleted": True}
            assert served.engine.stats().kv_blocks_pinned == 0
            for method in ("GET", "DELETE"):
                reply = await served.request(method, f"{PREFIXES}/{made['id']}")
                assert (reply.status, reply.error()["code"]) == (404, "prefix_not_found")
            assert await cached_tokens(served, TEXT + "?") == 128

    asyncio.run(scenario())


def test_a_pin_expires(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            made = await pin(served, text=TEXT, ttl_seconds=1)
            await served.fake.wait_until(lambda: served.engine.stats().kv_blocks_pinned == 0)
            assert (await served.request("GET", f"{PREFIXES}/{made['id']}")).status == 404

    asyncio.run(scenario())


def test_the_same_prefix_again_is_the_same_pin_and_lives_longer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            first = await pin(served, text=TEXT, ttl_seconds=30)
            again = await pin(served, text=TEXT, ttl_seconds=300, name="renamed")
            assert (again["id"], again["name"]) == (first["id"], "renamed")
            assert again["expires_at"] >= first["expires_at"] + 269
            assert served.engine.stats().kv_blocks_pinned == 8

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({}, 400, "text", "invalid_value"),
        ({"text": TEXT, "prompt_token_ids": [1]}, 400, "text", "invalid_value"),
        ({"text": "short"}, 400, "text", "invalid_value"),  # not one whole block
        ({"text": ""}, 400, "text", "invalid_value"),
        ({"prompt_token_ids": [999] * 20}, 400, "prompt_token_ids", "invalid_value"),
        ({"prompt_token_ids": []}, 400, "prompt_token_ids", "invalid_value"),
        ({"text": "x" * 2000}, 400, "text", "invalid_value"),  # more than may be pinned at all
        ({"text": "x" * 5000}, 400, "text", "invalid_value"),  # more than the context
        ({"text": TEXT, "ttl_seconds": 0}, 400, "ttl_seconds", "invalid_value"),
        ({"text": TEXT, "ttl_seconds": 1e9}, 400, "ttl_seconds", "invalid_value"),
        ({"text": TEXT, "name": "x" * 257}, 400, "name", "invalid_value"),
        ({"text": TEXT, "cache_salt": ""}, 400, "cache_salt", "invalid_value"),
        ({"text": TEXT, "model": "other"}, 404, "model", "model_not_found"),
        ({"text": TEXT, "prompt": "x"}, 400, "prompt", "invalid_value"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, body: dict[str, Any], status: int, param: str, code: str) -> None:
    async def scenario() -> None:
        async with serve(tmp_path, num_blocks=257) as served:  # a quarter is 64 blocks: 1,024 tokens
            reply = await served.post(PREFIXES, body)
            error = reply.error()
            assert (reply.status, error["param"], error["code"]) == (status, param, code)
            assert served.engine.stats().kv_blocks_pinned == 0

    asyncio.run(scenario())


def test_over_the_quota_is_429_until_another_goes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path, num_blocks=257) as served:
            first = await pin(served, text="a" * 800, ttl_seconds=100)
            reply = await served.post(PREFIXES, {"text": "b" * 800})
            assert (reply.status, reply.error()["code"]) == (429, "pin_quota_exceeded")
            assert 90 < int(reply.headers["Retry-After"]) <= 100
            await served.request("DELETE", f"{PREFIXES}/{first['id']}")
            assert (await pin(served, text="b" * 800))["num_blocks"] == 50

    asyncio.run(scenario())


def test_a_prompt_of_the_whole_context_runs_beside_all_that_may_be_pinned(tmp_path: Path) -> None:
    """The share alone would leave it too few blocks, and it would wait for ever."""

    async def scenario() -> None:
        settings = {"max_pinned_share": 0.9, "max_tenant_pinned_share": 0.9}
        async with serve(tmp_path, settings=settings, num_blocks=42, max_position_embeddings=512) as served:
            reply = await served.post(PREFIXES, {"text": "p" * 160})
            assert "at most 159 in the 9 KV blocks" in reply.error()["message"]
            await pin(served, text="p" * 150)
            body = {"prompt": "x" * 500, "max_tokens": 12, "temperature": 0}
            replies = await asyncio.wait_for(asyncio.gather(*(served.post(COMPLETIONS, body) for _ in range(4))), 20)
            assert [reply.json()["usage"]["completion_tokens"] for reply in replies] == [12] * 4

    asyncio.run(scenario())


def test_without_a_prefix_cache_nothing_can_be_pinned(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path, settings={"enable_prefix_caching": False}) as served:
            reply = await served.post(PREFIXES, {"text": TEXT})
            assert (reply.status, reply.error()["code"]) == (400, "unsupported_parameter")

    asyncio.run(scenario())


def test_a_dead_worker_has_the_pins_computed_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path, num_blocks=80, max_position_embeddings=512) as served:
            made = await pin(served, text=TEXT)
            served.executor.gate.clear()
            served.executor.die()
            await served.fake.wait_until(lambda: served.engine.stats().running == 1)
            shown = (await served.request("GET", f"{PREFIXES}/{made['id']}")).json()
            assert shown == made | {"state": "recomputing"}
            served.executor.gate.set()
            await served.fake.wait_until(lambda: served.engine.stats().kv_blocks_pinned == 8)
            await fill_cache(served)
            assert await cached_tokens(served, TEXT + "?") == 128
            assert (await served.request("GET", f"{PREFIXES}/{made['id']}")).json() == made

    asyncio.run(scenario())


def test_a_worker_that_dies_while_a_prefix_is_computed_only_delays_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            served.executor.gate.clear()
            task = asyncio.create_task(pin(served, text=TEXT))
            await served.fake.wait_until(lambda: served.engine.stats().running == 1)
            served.executor.die()
            served.executor.gate.set()
            assert (await task)["state"] == "ready"
            assert served.engine.stats().kv_blocks_pinned == 8

    asyncio.run(scenario())


def test_a_pin_deleted_while_it_is_computed_holds_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            served.executor.gate.clear()
            task = asyncio.create_task(served.post(PREFIXES, {"text": TEXT}))
            await served.fake.wait_until(lambda: served.engine.stats().running == 1)
            (listed,) = (await served.request("GET", PREFIXES)).json()["data"]
            assert listed["state"] == "computing"
            assert (await served.request("DELETE", f"{PREFIXES}/{listed['id']}")).status == 200
            assert (await task).status == 404
            served.executor.gate.set()
            await served.fake.wait_idle()
            assert served.engine.stats().kv_blocks_pinned == 0

    asyncio.run(scenario())


def test_a_client_that_goes_away_leaves_the_pin_to_itself(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            served.executor.gate.clear()
            task = asyncio.create_task(served.post(PREFIXES, {"text": TEXT}))
            await served.fake.wait_until(lambda: served.engine.stats().running == 1)
            task.cancel()
            served.executor.gate.set()
            await served.fake.wait_until(lambda: served.engine.stats().kv_blocks_pinned == 8)
            assert len((await served.request("GET", PREFIXES)).json()["data"]) == 1

    asyncio.run(scenario())


def test_pins_belong_to_a_tenant(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            service = InferenceService(served.engine, "fake")
            set_caller(Caller("a", tenant="one"))
            made = await service.create_prefix(list(TEXT.encode()))
            assert service.list_prefixes() == [made]
            assert [entry["id"] for entry in service.list_requests()] == [f"{made.id}-0"]
            set_caller(Caller("b", tenant="two"))
            assert service.list_requests() == []
            assert service.list_prefixes() == []
            for call in (service.get_prefix, service.delete_prefix):
                with pytest.raises(UnknownPrefixError):
                    call(made.id)
            set_caller(ANONYMOUS)
            assert await cached_tokens(served, TEXT + "?") == 0

    asyncio.run(scenario())


def test_metrics_show_pins_and_their_blocks(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path, num_blocks=101, max_position_embeddings=512) as served:
            await pin(served, text=TEXT)
            lines = (await served.request("GET", "/metrics")).body.decode().splitlines()
            assert "servd_prefix_pins 1.0" in lines
            blocks = {line.split('"')[1]: float(line.split()[-1]) for line in lines if line.startswith("servd_kv_bl")}
            assert blocks == {"used": 0.0, "pinned": 8.0, "cached": 0.0, "free": 92.0}

    asyncio.run(scenario())
