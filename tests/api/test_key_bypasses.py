"""Ways around a key and its limits that are closed: long streams, unseen work, foreign streams, long keys."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from servd.api import access
from servd.api.access import KeyRing
from servd.api.grpc._pb.inference import grpc_service_pb2 as kserve
from servd.api.grpc._pb.inference import grpc_service_pb2_grpc as kserve_grpc
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.keys import MAX_KEY_CHARS, KeyEntry, hash_key, new_key
from servd.errors import AuthenticationError, ConfigError
from tests.api.grpc.kserve_helpers import request_of
from tests.api.test_key_limits import KEYS, Fronts, fronts
from tests.api.test_tenants import call

Code = grpc.StatusCode


def metadata(who: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {KEYS[who]}")]


def infer_stream(servers: Fronts, who: str, requests: Any = None) -> Any:
    stub = kserve_grpc.GRPCInferenceServiceStub(servers.channel)
    return stub.ModelStreamInfer(requests, metadata=metadata(who))


def test_each_message_of_a_stream_counts_as_a_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with fronts(tmp_path, {"name": "ann", "requests_per_minute": 2}) as servers:
            requests = iter([request_of(max_tokens=2) for _ in range(3)])
            replies = [reply async for reply in infer_stream(servers, "ann", requests)]
            ends = [r for r in replies if r.infer_response.parameters["triton_final_response"].bool_param]
            assert sorted("2 a minute" in reply.error_message for reply in ends) == [False, False, True]
            assert (await servers.complete("ann"))[0] == 429

    asyncio.run(main())


def test_a_key_that_is_taken_back_ends_the_streams_it_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(access, "RELOAD_SECONDS", 0.0)
        async with fronts(tmp_path, {"name": "ann"}) as servers:
            stream = infer_stream(servers, "ann")
            await stream.write(request_of(max_tokens=1))
            assert not (await stream.read()).error_message
            entry = {"name": "ann", "hash": hash_key(KEYS["ann"]), "disabled": True}
            servers.key_file.write_text(json.dumps(entry))
            await stream.write(request_of(max_tokens=1))
            with pytest.raises(grpc.aio.AioRpcError, match="disabled") as caught:
                while await stream.read() is not grpc.aio.EOF:
                    pass
            assert caught.value.code() is Code.UNAUTHENTICATED

    asyncio.run(main())


def test_who_has_used_up_a_minute_may_still_look_and_stop_but_not_work(tmp_path: Path) -> None:
    async def main() -> None:
        async with fronts(tmp_path, {"name": "ann", "requests_per_minute": 1}) as servers:
            given = {"input": "x", "background": True, "max_output_tokens": 1500}
            status, response = await call(servers, "ann", "POST", "/v1/responses", given)
            assert status == 200
            kserve_stub = kserve_grpc.GRPCInferenceServiceStub(servers.channel)
            await servers.stub.ListModels(pb.ListModelsRequest(), metadata=metadata("ann"))
            await servers.stub.Abort(pb.AbortRequest(request_id="x"), metadata=metadata("ann"))
            await kserve_stub.ServerMetadata(kserve.ServerMetadataRequest(), metadata=metadata("ann"))
            assert (await call(servers, "ann", "GET", "/v1/models"))[0] == 200
            status, body = await call(servers, "ann", "POST", f"/v1/responses/{response['id']}/cancel")
            assert (status, body["status"]) == (200, "cancelled")
            for method, request in (("Tokenize", pb.TokenizeRequest(text="x")), ("Embed", pb.EmbedRequest())):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await getattr(servers.stub, method)(request, metadata=metadata("ann"))
                assert caught.value.code() is Code.RESOURCE_EXHAUSTED
            for path in ("/tokenize", "/v1/no/such/path", "/v1/responses/x/cancel/"):
                assert (await call(servers, "ann", "POST", path, {"prompt": "x"}))[0] == 429

    asyncio.run(main())


def test_a_lost_stream_can_be_read_on_without_being_paid_twice_by_its_tenant_alone(tmp_path: Path) -> None:
    async def main() -> None:
        entries = ({"name": "ann", "requests_per_minute": 1, "max_concurrent": 1}, {"name": "bob"})
        async with fronts(tmp_path, *entries, step_delay=0.002) as servers:
            body = {"prompt": "x", "max_tokens": 200, "stream": True, "ignore_eos": True}
            body["stream_options"] = {"resumable": True}
            headers = {"Authorization": f"Bearer {KEYS['ann']}"}
            url = f"{servers.url}/v1/completions"
            async with servers.session.post(url, json=body, headers=headers) as reply:
                last_id = (await reply.content.readline()).decode().removeprefix("id: ").strip()
            again = {"Last-Event-ID": last_id}
            foreign = {"Authorization": f"Bearer {KEYS['bob']}"} | again
            async with servers.session.post(url, json=body, headers=foreign) as reply:
                assert reply.status == 404
            async with servers.session.post(url, json=body, headers=headers | again) as reply:
                assert (await reply.text()).rstrip().endswith("data: [DONE]")

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["resumable", "background"])
def test_what_goes_on_without_a_client_holds_its_place(tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        async with fronts(tmp_path, {"name": "ann", "max_concurrent": 1}, step_delay=0.005) as servers:
            headers = {"Authorization": f"Bearer {KEYS['ann']}"}
            body: dict[str, Any] = {"input": "x", "max_output_tokens": 1500, "stream": True}
            body |= {"background": True} if kind == "background" else {"stream_options": {"resumable": True}}
            async with servers.session.post(f"{servers.url}/v1/responses", json=body, headers=headers) as reply:
                assert reply.status == 200
                await reply.content.readline()
            status, _, error = await servers.complete("ann")
            assert (status, "1 at once" in error["error"]["message"]) == (429, True)
            [running] = (await call(servers, "ann", "GET", "/v1/requests?state=running"))[1]["data"]
            servers.fake.engine.abort(running["id"])
            assert (await servers.complete("ann"))[0] == 200

    asyncio.run(main())


@pytest.mark.parametrize("fields", [{"best_of": 4}, {"best_of": 4, "use_beam_search": True}])
def test_answers_that_are_not_shown_are_paid_for_too(tmp_path: Path, fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with fronts(tmp_path, {"name": "ann", "tokens_per_minute": 1000}) as servers:
            given = {"prompt": "x" * 10, "max_tokens": 100, "ignore_eos": True, "temperature": 1.0} | fields
            if "use_beam_search" in fields:
                given["temperature"] = 0.0
            status, _, _ = await servers.complete("ann", **given)
            assert status == 200
            headers = {"Authorization": f"Bearer {KEYS['ann']}"}
            async with servers.session.get(f"{servers.url}/v1/models", headers=headers) as reply:
                assert int(reply.headers["x-ratelimit-remaining-tokens"]) <= 1000 - 10 - 4 * 100 + 60

    asyncio.run(main())


def test_a_key_of_kilobytes_is_compared_with_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def spying(entry: KeyEntry, key: str) -> bool:
        compared.append(key)
        return False

    monkeypatch.setattr(KeyEntry, "is_key", spying)
    (tmp_path / "keys").write_text(json.dumps({"name": "ann", "hash": hash_key(new_key())}))
    ring = KeyRing(None, tmp_path / "keys")
    with pytest.raises(AuthenticationError):
        ring.caller(["x" * 16_000, "y" * MAX_KEY_CHARS])
    assert compared == ["y" * MAX_KEY_CHARS]
    with pytest.raises(ConfigError, match="20 to 512"):
        hash_key("x" * (MAX_KEY_CHARS + 1))
