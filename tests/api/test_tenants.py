"""Pins, request records and embeddings under keys: each tenant sees its own, and its limits hold for them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.api.test_key_limits import KEYS, Fronts, fronts
from tests.fakes import HIDDEN_SIZE

TEXT = "The beginning that all of them share, word for word. " * 3


async def call(servers: Fronts, who: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {KEYS[who]}"}
    async with servers.session.request(method, servers.url + path, json=body, headers=headers) as reply:
        return reply.status, await reply.json()


def test_a_pin_is_seen_and_found_by_its_tenant_alone(tmp_path: Path) -> None:
    async def main() -> None:
        entries = ({"name": "ann", "tenant": "one"}, {"name": "bob", "tenant": "one"}, {"name": "carl"})
        async with fronts(tmp_path, *entries) as servers:
            _, pin = await call(servers, "ann", "POST", "/v1/prefixes", {"text": TEXT, "cache_salt": "s"})
            path = f"/v1/prefixes/{pin['id']}"
            for who, status, cached in (("bob", 200, len(TEXT) // 16 * 16), ("carl", 404, 0)):
                assert (await call(servers, who, "GET", path))[0] == status
                assert len((await call(servers, who, "GET", "/v1/prefixes"))[1]["data"]) == (status == 200)
                _, _, reply = await servers.complete(who, prompt=TEXT + who, cache_salt="s")
                assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
            _, _, reply = await servers.complete("bob", prompt=TEXT + "bob")  # without the salt
            assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert (await call(servers, "carl", "DELETE", path))[0] == 404
            assert (await call(servers, "bob", "DELETE", path))[0] == 200

    asyncio.run(main())


def test_records_are_the_tenants_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with fronts(tmp_path, {"name": "ann"}, {"name": "bob"}) as servers:
            _, headers, reply = await servers.complete("ann")
            for name in (reply["id"], headers["X-Request-Id"]):
                assert (await call(servers, "ann", "GET", f"/v1/requests/{name}"))[0] == 200
                status, body = await call(servers, "bob", "GET", f"/v1/requests/{name}")
                assert (status, body["error"]["code"]) == (404, "request_not_found")
            assert (await call(servers, "bob", "GET", "/v1/requests"))[1]["data"] == []

    asyncio.run(main())


def test_embeddings_keep_to_the_keys_limits(tmp_path: Path) -> None:
    async def main() -> None:
        entry = {"name": "ann", "max_concurrent": 2, "tokens_per_minute": 1000}
        async with fronts(tmp_path, entry) as servers:
            status, body = await call(servers, "ann", "POST", "/v1/embeddings", {"input": ["ab"] * 20})
            assert (status, len(body["data"]), len(body["data"][0]["embedding"])) == (200, 20, HIDDEN_SIZE)
            status, body = await call(servers, "ann", "POST", "/v1/embeddings", {"input": ["x" * 900, "y" * 900]})
            assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")

    asyncio.run(main())


def test_a_pinned_prefix_is_charged_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with fronts(tmp_path, {"name": "ann", "tokens_per_minute": 300, "max_concurrent": 1}) as servers:
            assert (await call(servers, "ann", "POST", "/v1/prefixes", {"text": TEXT}))[0] == 200
            status, body = await call(servers, "ann", "POST", "/v1/prefixes", {"text": TEXT * 2})
            assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
            assert (await servers.complete("ann", prompt="x"))[0] == 200  # its place was given back

    asyncio.run(main())


def test_the_engines_events_name_a_tenants_own_requests_alone(tmp_path: Path) -> None:
    async def main() -> None:
        entries = ({"name": "ann", "tenant": "one"}, {"name": "bob", "tenant": "one"}, {"name": "carl"})
        async with fronts(tmp_path, *entries, step_delay=0.01) as servers:
            works = [
                asyncio.create_task(servers.complete("ann", max_tokens=1500, ignore_eos=True)),
                asyncio.create_task(servers.generate("ann", request_id="private-name")),
            ]

            async def frame_with_a_step(who: str) -> Any:
                headers = {"Authorization": f"Bearer {KEYS[who]}"}
                async with servers.session.get(f"{servers.url}/v1/engine/events", headers=headers) as reply:
                    async for line in reply.content:
                        frame = json.loads(line[6:]) if line.startswith(b"data: ") else None
                        if frame is not None and frame["steps"] and frame["num_running"] == 1:
                            return frame

            await works[1]
            own, foreign = await asyncio.gather(frame_with_a_step("bob"), frame_with_a_step("carl"))
            assert len(own["running"]) == 1
            assert any(part[0] == own["running"][0]["id"] for step in own["steps"] for part in step["parts"])
            assert (foreign["running"], foreign["waiting"]) == ([], []) and foreign["steps"][-1]["requests"] >= 1
            assert own["running"][0]["id"] not in json.dumps(foreign) and "private-name" not in json.dumps(foreign)
            works[0].cancel()
            await asyncio.gather(*works, return_exceptions=True)

    asyncio.run(main())
