"""Embed and the prefix calls: the same as over HTTP, refusals named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.keys import hash_key, new_key
from servd.config import ServerConfig
from tests.api.grpc.grpc_helpers import MODEL, Served, blamed_field, error_of, run, served

Code = grpc.StatusCode


def embed(s: Served, *texts: str, **fields: Any) -> Any:
    return s.stub.Embed(pb.EmbedRequest(inputs=[pb.EmbedInput(text=text) for text in texts], **fields))


def test_embed_gives_one_vector_an_input(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            reply = await embed(s, "one", "three", pooling=pb.POOLING_MEAN)
            assert reply.model == MODEL
            assert [one.index for one in reply.embeddings] == [0, 1]
            assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (8, 0)
            lengths = [sum(value * value for value in one.values) for one in reply.embeddings]
            assert lengths == pytest.approx([1.0, 1.0])
            alone = await embed(s, "three", pooling=pb.POOLING_MEAN)
            assert alone.embeddings[0].values == reply.embeddings[1].values
            ids = pb.EmbedInput(token_ids=pb.TokenIds(ids=list(b"three")))
            by_ids = await s.stub.Embed(pb.EmbedRequest(inputs=[ids], pooling=pb.POOLING_MEAN))
            assert by_ids.embeddings[0].values == alone.embeddings[0].values
            short = await embed(s, "three", dimensions=2)
            assert len(short.embeddings[0].values) == 2
            await s.fake.wait_idle()

    run(test)


EMBED_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no inputs": ({}, "inputs"),
    "too many inputs": ({"inputs": [pb.EmbedInput(text="x")] * 2049}, "inputs"),
    "an input of no kind": ({"inputs": [pb.EmbedInput(text="x"), pb.EmbedInput()]}, "inputs[1].input"),
    "an empty text": ({"inputs": [pb.EmbedInput(text="")]}, "inputs[0].text"),
    "too long": ({"inputs": [pb.EmbedInput(text="x" * 3000)]}, "inputs[0].text"),
    "id out of range": ({"inputs": [pb.EmbedInput(token_ids=pb.TokenIds(ids=[999]))]}, "inputs[0].token_ids"),
    "dimensions 0": ({"inputs": [pb.EmbedInput(text="x")], "dimensions": 0}, "dimensions"),
    "dimensions too many": ({"inputs": [pb.EmbedInput(text="x")], "dimensions": 1 << 30}, "dimensions"),
    "unknown pooling": ({"inputs": [pb.EmbedInput(text="x")], "pooling": 9}, "pooling"),
    "long salt": ({"inputs": [pb.EmbedInput(text="x")], "cache_salt": "x" * 300}, "cache_salt"),
}


@pytest.mark.parametrize("case", EMBED_WRONG)
def test_a_wrong_embed_is_named(case: str, tmp_path: Path) -> None:
    fields, blamed = EMBED_WRONG[case]

    async def test() -> None:
        async with served(tmp_path) as s:
            error = await error_of(s.stub.Embed(pb.EmbedRequest(**fields)))
            assert (error.code(), blamed_field(error)) == (Code.INVALID_ARGUMENT, blamed)
            await s.fake.wait_idle()

    run(test)


def test_a_prefix_is_kept_listed_and_given_up(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            text = "a beginning of many prompts, of more than two blocks"
            made = await s.stub.CreatePrefix(pb.CreatePrefixRequest(text=text, name="beginning", ttl_seconds=60))
            assert (made.name, made.num_tokens, made.num_blocks, made.state) == ("beginning", len(text), 3, "ready")
            assert made.bytes == 3 * 1024
            assert made.expires_at - made.created_at == pytest.approx(60, abs=1)
            assert (await s.stub.ListPrefixes(pb.ListPrefixesRequest())).prefixes == [made]
            assert await s.stub.GetPrefix(pb.GetPrefixRequest(id=made.id)) == made
            chunks = [chunk async for chunk in s.generate(text + " go on", max_tokens=1)]
            assert chunks[-1].usage.cached_tokens == 48
            ids = pb.CreatePrefixRequest(token_ids=pb.TokenIds(ids=list(text.encode())))
            assert (await s.stub.CreatePrefix(ids)).id == made.id
            await s.stub.DeletePrefix(pb.DeletePrefixRequest(id=made.id))
            assert not (await s.stub.ListPrefixes(pb.ListPrefixesRequest())).prefixes
            for call in (
                s.stub.GetPrefix(pb.GetPrefixRequest(id=made.id)),
                s.stub.DeletePrefix(pb.DeletePrefixRequest(id=made.id)),
            ):
                assert (await error_of(call)).code() == Code.NOT_FOUND
            await s.fake.wait_idle()

    run(test)


def test_a_conversation_can_be_a_prefix(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            system = pb.ChatMessage(role="system", content="You answer in one word, and never more than that.")
            made = await s.stub.CreatePrefix(
                pb.CreatePrefixRequest(conversation=pb.Conversation(messages=[system]))
            )
            user = pb.ChatMessage(role="user", content="Hi")
            request = pb.ChatRequest(messages=[system, user], sampling_params=pb.SamplingParams(max_tokens=1))
            chunks = [chunk async for chunk in s.stub.Chat(request)]
            assert chunks[-1].usage.cached_tokens == 16 * made.num_blocks > 0
            await s.stub.DeletePrefix(pb.DeletePrefixRequest(id=made.id))

    run(test)


PREFIX_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "prefix"),
    "an empty text": ({"text": ""}, "text"),
    "too long": ({"text": "x" * 3000}, "text"),
    "ttl nan": ({"text": "x" * 20, "ttl_seconds": float("nan")}, "ttl_seconds"),
    "ttl 0": ({"text": "x" * 20, "ttl_seconds": 0}, "ttl_seconds"),
    "long name": ({"text": "x" * 20, "name": "x" * 300}, "name"),
    "unknown role": (
        {"conversation": pb.Conversation(messages=[pb.ChatMessage(role="x")])}, "conversation.messages[0].role"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PREFIX_WRONG)
def test_a_wrong_prefix_is_named(case: str, tmp_path: Path) -> None:
    fields, blamed = PREFIX_WRONG[case]

    async def test() -> None:
        async with served(tmp_path) as s:
            error = await error_of(s.stub.CreatePrefix(pb.CreatePrefixRequest(**fields)))
            assert (error.code(), blamed_field(error)) == (Code.INVALID_ARGUMENT, blamed)
            await s.fake.wait_idle()

    run(test)


def test_a_record_tells_of_a_request(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            call = s.stub.Generate(
                pb.GenerateRequest(text="Hello", request_id="mine"), metadata=[("x-request-id", "call-1")]
            )
            chunks = [chunk async for chunk in call]
            record = await s.stub.GetRequestRecord(pb.GetRequestRecordRequest(request_id="mine"))
            assert (record.request_id, record.record["state"]) == ("mine", "finished")
            by_call = await s.stub.GetRequestRecord(pb.GetRequestRecordRequest(request_id="call-1"))
            assert (by_call.request_id, by_call.record["state"]) == ("call-1", "finished")
            (listed,) = (await s.stub.ListRequestRecords(pb.ListRequestRecordsRequest(state="finished"))).records
            assert listed.request_id == chunks[0].request_id == "mine"
            assert not (await s.stub.ListRequestRecords(pb.ListRequestRecordsRequest(state="running"))).records
            unknown = await error_of(s.stub.GetRequestRecord(pb.GetRequestRecordRequest(request_id="other")))
            assert unknown.code() == Code.NOT_FOUND
            for wrong, field in (({"state": "asleep"}, "state"), ({"limit": 0}, "limit"), ({"limit": 9999}, "limit")):
                error = await error_of(s.stub.ListRequestRecords(pb.ListRequestRecordsRequest(**wrong)))
                assert (error.code(), blamed_field(error)) == (Code.INVALID_ARGUMENT, field)

    run(test)


def test_tenants_do_not_see_each_others_prefixes_and_requests(tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("ann", "bob")}
    file = tmp_path / "keys"
    file.write_text("".join(json.dumps({"name": name, "hash": hash_key(key)}) + "\n" for name, key in keys.items()))
    config = ServerConfig(grpc_port=0, api_keys_file=str(file))
    ann, bob = ([("x-api-key", keys[name])] for name in ("ann", "bob"))

    async def test() -> None:
        async with served(tmp_path, server_config=config) as s:
            made = await s.stub.CreatePrefix(pb.CreatePrefixRequest(text="x" * 40), metadata=ann)
            assert not (await s.stub.ListPrefixes(pb.ListPrefixesRequest(), metadata=bob)).prefixes
            error = await error_of(s.stub.DeletePrefix(pb.DeletePrefixRequest(id=made.id), metadata=bob))
            assert error.code() == Code.NOT_FOUND
            s.fake.executor.gate.clear()
            request = pb.GenerateRequest(text="x", request_id="anns")
            call = s.stub.Generate(request, metadata=ann)
            await s.fake.wait_until(lambda: s.fake.engine.stats().running == 1)
            assert not (await s.stub.Abort(pb.AbortRequest(request_id="anns"), metadata=bob)).aborted
            assert (await s.stub.Abort(pb.AbortRequest(request_id="anns"), metadata=ann)).aborted
            s.fake.executor.gate.set()
            assert (await error_of(call)).code() == Code.UNAVAILABLE
            await s.stub.DeletePrefix(pb.DeletePrefixRequest(id=made.id), metadata=ann)

    run(test)
