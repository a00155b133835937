"""POST /v1/embeddings over the fakes: forms of input and output, extensions, refusals, and the `openai` client."""

from __future__ import annotations

import asyncio
import base64
import math
from array import array
from pathlib import Path
from typing import Any

import pytest
from openai.types import CreateEmbeddingResponse

from tests.api.http.serving import CHAT, Served, serve
from tests.fakes import HIDDEN_SIZE, fake_embedding

EMBEDDINGS = "/v1/embeddings"


def expected(text: str, pooling: str = "last", dimensions: int = HIDDEN_SIZE, *, normalize: bool = True) -> list[float]:
    values = fake_embedding(list(text.encode()), pooling)[:dimensions]
    length = math.sqrt(sum(value * value for value in values)) if normalize else 1.0
    return array("f", (value / length for value in values)).tolist()


async def vectors(served: Served, **body: Any) -> list[list[float]]:
    reply = await served.post(EMBEDDINGS, body)
    assert reply.status == 200, reply.body
    found = CreateEmbeddingResponse.model_validate(reply.json(), strict=True)
    assert [entry.index for entry in found.data] == list(range(len(found.data)))
    return [entry.embedding for entry in found.data]


def test_every_form_of_input_gives_the_same_vectors_in_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            texts = ["first text", "a second one"]
            both = [expected(text) for text in texts]
            assert await vectors(served, input=texts[0]) == both[:1]
            assert await vectors(served, input=texts) == both
            assert await vectors(served, input=list(texts[0].encode())) == both[:1]
            assert await vectors(served, input=[list(text.encode()) for text in texts], user="me") == both

    asyncio.run(scenario())


def test_usage_counts_all_prompts_and_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            reply = await served.post(EMBEDDINGS, {"input": ["abc", "de"], "model": "fake"})
            assert reply.json()["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
            assert (reply.json()["object"], reply.json()["model"]) == ("list", "fake")

    asyncio.run(scenario())


def test_base64_is_little_endian_float32(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            reply = await served.post(EMBEDDINGS, {"input": "some text", "encoding_format": "base64"})
            data = base64.b64decode(reply.json()["data"][0]["embedding"])
            assert array("f", data).tolist() == expected("some text")

    asyncio.run(scenario())


def test_dimensions_cut_and_normalize_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            (found,) = await vectors(served, input="some text", dimensions=3)
            assert found == expected("some text", dimensions=3)
            assert math.fsum(value * value for value in found) == pytest.approx(1.0, abs=1e-6)
            plain = await vectors(served, input="some text", dimensions=3, normalize=False)
            assert plain == [expected("some text", dimensions=3, normalize=False)]

    asyncio.run(scenario())


def test_pooling_is_the_requests_or_the_flags(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path, settings={"embedding_pooling": "mean"}) as served:
            assert await vectors(served, input="some text") == [expected("some text", "mean")]
            assert await vectors(served, input="some text", pooling="cls") == [expected("some text", "cls")]

    asyncio.run(scenario())


def test_a_mean_sees_every_position_though_the_prefix_is_cached(tmp_path: Path) -> None:
    """The fake worker asserts that it computed each position of a pooled prompt."""

    async def scenario() -> None:
        async with serve(tmp_path, settings={"max_num_batched_tokens": 16, "max_num_seqs": 8}) as served:
            text = "the same prefix again and again, " * 5
            for pooling in ("last", "mean", "cls", "last"):
                assert await vectors(served, input=text, pooling=pooling) == [expected(text, pooling)]
            hits = served.engine.core.scheduler.cache.prefix_hits
            assert 0 < hits < len(text)  # of the last one alone

    asyncio.run(scenario())


def test_truncation_keeps_the_last_tokens(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path, max_position_embeddings=64) as served:
            text = "x" * 100 + "the end"
            assert await vectors(served, input=text, truncate_prompt_tokens=7) == [expected("the end")]
            assert await vectors(served, input=text, truncate_prompt_tokens=-1) == [expected(text[-64:])]
            assert await vectors(served, input=text[-64:]) == [expected(text[-64:])]  # all of the context
            error = (await served.post(EMBEDDINGS, {"input": text})).error()
            assert error["param"] == "input" and "107 tokens" in error["message"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [1, 999]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": HIDDEN_SIZE + 1}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "deadline_ms": 0}, "deadline_ms"),
        ({"input": "a", "cache_salt": ""}, "cache_salt"),
        ({"input": "a", "priority": 1}, "priority"),
        ({"input": "a", "temperature": 0}, "temperature"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, body: dict[str, Any], param: str) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            reply = await served.post(EMBEDDINGS, body)
            assert (reply.status, reply.error()["param"]) == (400, param)

    asyncio.run(scenario())


def test_an_unknown_model_is_not_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            reply = await served.post(EMBEDDINGS, {"input": "a", "model": "text-embedding-3-small"})
            assert (reply.status, reply.error()["param"]) == (404, "model")

    asyncio.run(scenario())


def test_the_openai_client_reads_both_of_its_formats(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served, served.openai() as client:
            by_default = await client.embeddings.create(model="fake", input=["a text", "b"])  # asks for base64
            floats = await client.embeddings.create(model="fake", input="a text", encoding_format="float")
            assert [e.embedding for e in by_default.data] == [expected("a text"), expected("b")]
            assert floats.data[0].embedding == expected("a text")

    asyncio.run(scenario())


def test_more_inputs_than_the_queue_takes_are_run_a_few_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = {"max_num_seqs": 4, "max_num_queued_reqs": 3}
        async with serve(tmp_path, settings=settings) as served:
            texts = [f"text number {i}" for i in range(50)]
            assert await vectors(served, input=texts) == [expected(text) for text in texts]

    asyncio.run(scenario())


def test_vectors_survive_preemption_and_a_dead_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
        async with serve(tmp_path, settings=settings, num_blocks=20, max_position_embeddings=256) as served:
            texts = [f"{i} " * 30 for i in range(12)]
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "temperature": 0}
            chats = [asyncio.create_task(served.post(CHAT, chat)) for _ in range(3)]
            task = asyncio.create_task(vectors(served, input=texts, pooling="mean"))
            await served.fake.wait_until(lambda: len(served.executor.plans) > 12)
            served.executor.die()
            assert await task == [expected(text, "mean") for text in texts]
            assert [(await chat).status for chat in chats] == [200] * 3
            assert served.executor.num_starts == 2

    asyncio.run(scenario())


def test_a_deadline_ends_the_whole_call(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            served.executor.gate.clear()
            reply = await served.post(EMBEDDINGS, {"input": ["a", "b", "c"], "deadline_ms": 50})
            assert reply.status == 408
            served.executor.gate.set()

    asyncio.run(scenario())


def test_a_client_that_goes_away_leaves_nothing_running(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve(tmp_path) as served:
            served.executor.gate.clear()
            task = asyncio.create_task(served.post(EMBEDDINGS, {"input": ["a", "b", "c"]}))
            await served.fake.wait_until(lambda: served.engine.stats().running == 3)
            task.cancel()
            await served.fake.wait_until(lambda: served.engine.stats().running == 0)
            served.executor.gate.set()

    asyncio.run(scenario())
