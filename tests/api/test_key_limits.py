"""Keys with limits on real servers: HTTP and gRPC count together, scopes hold, tenants share no cache.

Faults: 11 (keys), 30 (prefix cache within one tenant).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest

from servd.api.access import KeyRing
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc as pb_grpc
from servd.api.grpc.server import start_grpc
from servd.api.http.app import start_http, stop_http
from servd.api.keys import hash_key, new_key
from servd.api.service import InferenceService
from servd.config import ServerConfig
from tests.fakes import FakeEngine

KEYS = {name: new_key() for name in ("ann", "bob", "carl")}


@dataclass
class Fronts:
    """Both fronts of one service."""

    fake: FakeEngine
    session: aiohttp.ClientSession
    url: str
    stub: Any
    channel: grpc.aio.Channel
    key_file: Path

    async def complete(self, who: str, **fields: Any) -> tuple[int, Any, dict[str, Any]]:
        body = {"prompt": "hello", "max_tokens": 5} | fields
        headers = {"Authorization": f"Bearer {KEYS[who]}"}
        async with self.session.post(f"{self.url}/v1/completions", json=body, headers=headers) as reply:
            return reply.status, reply.headers, await reply.json()

    async def generate(self, who: str, **fields: Any) -> Any:
        """A gRPC call, read to its end."""
        request = pb.GenerateRequest(text="hello", sampling_params=pb.SamplingParams(max_tokens=5), **fields)
        return [c async for c in self.stub.Generate(request, metadata=[("authorization", f"Bearer {KEYS[who]}")])]


@asynccontextmanager
async def fronts(folder: Path, *entries: dict[str, Any], **options: Any) -> AsyncIterator[Fronts]:
    file = folder / "keys"
    file.write_text("\n".join(json.dumps(entry | {"hash": hash_key(KEYS[entry["name"]])}) for entry in entries))
    config = ServerConfig(port=0, grpc_port=0, api_keys_file=str(file))
    keys = KeyRing.of(config)
    async with FakeEngine(folder, {}, 2048, options) as fake:
        service = InferenceService(fake.engine, "fake")
        runner, port = await start_http(service, config, keys=keys)
        server, grpc_port = await start_grpc(service, config, keys=keys)
        try:
            async with aiohttp.ClientSession() as session, grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as chan:
                stub = pb_grpc.InferenceStub(chan)  # type: ignore[no-untyped-call]
                yield Fronts(fake, session, f"http://127.0.0.1:{port}", stub, chan, file)
            await fake.wait_idle()
        finally:
            await server.stop(0)
            await stop_http(runner)


def test_requests_are_counted_over_both_fronts(tmp_path: Path) -> None:
    async def main() -> None:
        async with fronts(tmp_path, {"name": "ann", "requests_per_minute": 3}, {"name": "bob"}) as servers:
            status, headers, _ = await servers.complete("ann")
            assert (status, headers["x-ratelimit-limit-requests"]) == (200, "3")
            assert headers["x-ratelimit-remaining-requests"] == "2"
            await servers.generate("ann")
            status, headers, _ = await servers.complete("ann", stream=False)
            assert (status, headers["x-ratelimit-remaining-requests"]) == (200, "0")
            status, headers, body = await servers.complete("ann")
            assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(headers["Retry-After"]) <= 20 and headers["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(grpc.aio.AioRpcError, match="3 a minute") as caught:
                await servers.generate("ann")
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            status, headers, _ = await servers.complete("bob")
            assert status == 200 and not [name for name in headers if name.lower().startswith("x-ratelimit")]

    asyncio.run(main())


def test_tokens_of_prompts_and_answers_are_charged(tmp_path: Path) -> None:
    async def main() -> None:
        async with fronts(tmp_path, {"name": "ann", "tokens_per_minute": 40}) as servers:
            remaining = []
            for _ in range(2):
                status, headers, _ = await servers.complete("ann", ignore_eos=True)
                assert status == 200
                remaining.append(int(headers["x-ratelimit-remaining-tokens"]))
            assert 30 <= remaining[0] <= 31 and 20 <= remaining[1] <= 22, "five of the prompt, five of the answer"
            await servers.generate("ann")
            status, headers, body = await servers.complete("ann", prompt="x" * 30)
            assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
            assert "40 a minute" in body["error"]["message"] and int(headers["Retry-After"]) > 20

    asyncio.run(main())


def test_an_answer_in_work_holds_its_place_until_it_ends_or_the_client_goes(tmp_path: Path) -> None:
    async def main() -> None:
        async with fronts(tmp_path, {"name": "ann", "max_concurrent": 1}, {"name": "bob"}) as servers:
            gate = servers.fake.executor.gate
            gate.clear()
            first = asyncio.create_task(servers.complete("ann"))
            await servers.fake.wait_until(lambda: servers.fake.engine.stats().running == 1)
            status, headers, body = await servers.complete("ann")
            assert (status, headers["Retry-After"]) == (429, "1") and "1 at once" in body["error"]["message"]
            with pytest.raises(grpc.aio.AioRpcError, match="1 at once"):
                await servers.generate("ann")
            first.cancel()
            await servers.fake.wait_until(lambda: servers.fake.engine.stats().running == 0)
            gate.set()
            assert (await servers.complete("ann"))[0] == 200
            assert (await servers.complete("ann", n=3))[0] == 200
            assert (await servers.complete("ann", prompt=[999]))[0] == 400
            await servers.generate("ann")

    asyncio.run(main())


def test_more_prompts_than_the_key_may_ever_have_in_work_are_refused_for_good(tmp_path: Path) -> None:
    async def main() -> None:
        async with fronts(tmp_path, {"name": "ann", "max_concurrent": 2}, {"name": "bob"}) as servers:
            status, headers, body = await servers.complete("ann", prompt=["a", "b", "c"])
            assert (status, body["error"]["param"]) == (400, "prompt") and "Retry-After" not in headers
            assert "allowed with this key: 2 at once" in body["error"]["message"]
            assert (await servers.complete("ann", prompt=["a", "b"]))[0] == 200
            assert (await servers.complete("bob", prompt=["a", "b", "c"]))[0] == 200

    asyncio.run(main())


def test_a_model_out_of_scope_looks_like_none(tmp_path: Path) -> None:
    async def main() -> None:
        entries = ({"name": "ann", "models": ["other"]}, {"name": "bob", "models": ["fake"]})
        async with fronts(tmp_path, *entries) as servers:
            answers = []
            for model in ("fake", "nothing"):
                status, _, body = await servers.complete("ann", model=model)
                answers.append((status, body["error"]["message"].replace(model, "?")))
            assert answers[0] == answers[1] and answers[0][0] == 404
            assert (await servers.complete("ann"))[0] == 404, "also if it is not named"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await servers.generate("ann")
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            assert (await servers.complete("bob", model="fake"))[0] == 200
            for who, models in (("ann", 0), ("bob", 1)):
                headers = {"x-api-key": KEYS[who]}
                async with servers.session.get(f"{servers.url}/v1/models", headers=headers) as reply:
                    assert len((await reply.json())["data"]) == models
                listed = await servers.stub.ListModels(pb.ListModelsRequest(), metadata=[("x-api-key", KEYS[who])])
                assert len(listed.models) == models

    asyncio.run(main())


def test_tenants_share_no_cached_prefix(tmp_path: Path) -> None:
    entries = ({"name": "ann", "tenant": "t"}, {"name": "bob", "tenant": "t"}, {"name": "carl"})

    async def main() -> None:
        async with fronts(tmp_path, *entries) as servers:
            async def cached(who: str, **fields: Any) -> int:
                _, _, body = await servers.complete(who, prompt="p" * 100, **fields)
                return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])

            async def cached_by_grpc(who: str) -> int:
                request = pb.GenerateRequest(text="p" * 100, sampling_params=pb.SamplingParams(max_tokens=1))
                call = servers.stub.Generate(request, metadata=[("x-api-key", KEYS[who])])
                return [int(chunk.usage.cached_tokens) async for chunk in call][-1]

            assert await cached("ann") == 0
            assert await cached("ann") == 96
            assert await cached("bob") == 96, "of the same tenant"
            assert await cached("carl") == 0
            assert await cached("carl", cache_salt="t") == 0
            assert await cached("bob", cache_salt="s") == 0
            assert await cached("ann", cache_salt="s") == 96
            assert await cached_by_grpc("bob") == 96
            assert await cached_by_grpc("carl") == 96
            assert await cached("carl") == 96

    asyncio.run(main())
