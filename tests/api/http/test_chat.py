"""/v1/chat/completions through the official client and through the wire, strictly validated."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.api.http.serving import CHAT, Served, serve

REPLIES = {"greet": "Hello, 世界 😀!", "count": "one two three"}
ASK = {"model": "fake", "messages": [{"role": "user", "content": "greet"}]}


async def chat(server: Served, **fields: Any) -> dict[str, Any]:
    reply = await server.post(CHAT, ASK | fields)
    assert reply.status == 200, reply.body
    value = reply.json()
    ChatCompletion.model_validate(value, strict=True)
    assert value["object"] == "chat.completion" and value["id"].startswith("chatcmpl-")
    return value


def prompt_of(server: Served) -> str:
    """The prompt of the last request that reached the model."""
    token_ids = [new.token_ids for plan in server.executor.plans for new in plan.new_requests][-1]
    return bytes(token_ids).decode()


def test_reply(tmp_path: Path) -> None:
    async def main() -> dict[str, Any]:
        async with serve(tmp_path, replies=REPLIES) as server:
            return await chat(server)

    reply = asyncio.run(main())
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLIES["greet"], "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]


def test_without_max_tokens_the_answer_fills_the_context(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, max_position_embeddings=100) as server:
            reply = await chat(server)
            assert reply["usage"]["total_tokens"] == 100
            assert reply["choices"][0]["finish_reason"] == "length"
            for name in ("max_tokens", "max_completion_tokens"):
                assert (await chat(server, **{name: 3}))["usage"]["completion_tokens"] == 3

    asyncio.run(main())


def test_messages_reach_the_template(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
            call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
            messages = [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": parts, "name": "ann"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "42", "tool_call_id": "c1"},
                {"role": "assistant", "content": "ok", "refusal": None, "annotations": [], "audio": None},
                {"role": "user", "content": ""},
            ]
            await chat(server, messages=messages, max_tokens=1)
            assert prompt_of(server) == (
                "system: be brief\nuser: a\nb\n"
                'assistant: <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
                "user: <tool_response>\n42\n</tool_response>\nassistant: ok\nuser: \nassistant: "
            )
            thinking = {"enable_thinking": False}
            await chat(server, max_tokens=1, add_generation_prompt=False, chat_template_kwargs=thinking)
            assert prompt_of(server) == '[{"enable_thinking": false}]\nuser: greet\n'

    asyncio.run(main())


def test_logprobs(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            reply = await chat(server, logprobs=True, top_logprobs=2, max_tokens=1)
            assert reply["choices"][0]["logprobs"]["content"] == [
                {
                    "token": "H",
                    "logprob": -0.5,
                    "bytes": [72],
                    "top_logprobs": [
                        {"token": "H", "logprob": -0.5, "bytes": [72]},
                        {"token": "I", "logprob": -1.5, "bytes": [73]},
                    ],
                }
            ]
            plain = await chat(server, logprobs=True, max_tokens=1)
            assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []

    asyncio.run(main())


def test_fields_without_effect_and_neutral_ones_are_taken(tmp_path: Path) -> None:
    neutral: dict[str, Any] = {
        "user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k", "service_tier": "auto",
        "store": False, "modalities": ["text"], "response_format": {"type": "text"}, "tools": [], "tool_choice": "none",
        "parallel_tool_calls": False, "verbosity": "medium", "stream": False, "n": 1, "audio": None, "top_k": -1,
        "logprobs": False, "logit_bias": {}, "stop": [], "reasoning_effort": None, "web_search_options": None,
    }  # fmt: skip

    async def main() -> str:
        async with serve(tmp_path, replies=REPLIES) as server:
            return (await chat(server, **neutral))["choices"][0]["message"]["content"]

    assert asyncio.run(main()) == REPLIES["greet"]


def test_stream_on_the_wire(tmp_path: Path) -> None:
    async def main() -> list[Any]:
        async with serve(tmp_path, replies=REPLIES, step_delay=0.001) as server:
            options = {"include_usage": True}
            reply = await server.post(CHAT, ASK | {"stream": True, "n": 2, "stream_options": options})
            assert reply.headers["Cache-Control"] == "no-cache"
            return reply.events()

    events = asyncio.run(main())
    assert events.pop() == "[DONE]"
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=True)
    usage = events.pop()
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2 * (len(REPLIES["greet"].encode()) + 1))
    for index in (0, 1):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == REPLIES["greet"]
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


def test_stream_with_logprobs_and_token_ids_shows_every_token(tmp_path: Path) -> None:
    async def main() -> list[Any]:
        async with serve(tmp_path, replies=REPLIES) as server:
            fields = {"stream": True, "logprobs": True, "return_token_ids": True}
            return (await server.post(CHAT, ASK | fields)).events()

    events = asyncio.run(main())
    choices = [event["choices"][0] for event in events[:-1]]
    tokens = list(REPLIES["greet"].encode()) + [256]
    assert choices[0]["prompt_token_ids"] == list(b"user: greet\nassistant: ")
    assert [i for choice in choices for i in choice.get("token_ids", [])] == tokens
    shown = [entry["bytes"] for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert shown == [[i] if i < 256 else list(b"<eos>") for i in tokens]


def test_async_openai_client(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server, server.openai() as client:
            ask: Any = ASK
            whole = await client.chat.completions.create(**ask)
            assert whole.choices[0].message.content == REPLIES["greet"]
            texts = []
            async for chunk in await client.chat.completions.create(**ask, stream=True):
                texts.append(chunk.choices[0].delta.content or "")
            assert "".join(texts) == REPLIES["greet"]
            async with client.chat.completions.stream(**ask) as stream:
                final = await stream.get_final_completion()
            assert final.choices[0].message.content == REPLIES["greet"]
            completion = await client.completions.create(model="fake", prompt="count", max_tokens=3)
            assert completion.choices[0].text == "one"
            assert [model.id async for model in client.models.list()] == ["fake"]
            assert (await client.models.retrieve("fake")).owned_by == "servd"

    asyncio.run(main())


def test_sync_openai_client(tmp_path: Path) -> None:
    def use(server: Served) -> None:
        with server.sync_openai() as client:
            ask: Any = ASK
            whole = client.chat.completions.create(**ask)
            assert whole.choices[0].message.content == REPLIES["greet"]
            chunks = client.chat.completions.create(**ask, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == REPLIES["greet"]
            with client.chat.completions.stream(**ask) as stream:
                assert stream.get_final_completion().choices[0].finish_reason == "stop"
            completions = client.completions.create(model="fake", prompt="count", max_tokens=7, stream=True)
            assert "".join(chunk.choices[0].text for chunk in completions) == "one two"

    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            await asyncio.to_thread(use, server)

    asyncio.run(main())


def test_prompt_logprobs_and_token_ids_at_the_top_level(tmp_path: Path) -> None:
    async def main() -> dict[str, Any]:
        async with serve(tmp_path, replies=REPLIES) as server:
            return await chat(server, prompt_logprobs=0, return_token_ids=True, max_tokens=2)

    reply = asyncio.run(main())
    prompt = list(b"user: greet\nassistant: ")
    assert reply["prompt_token_ids"] == prompt
    assert reply["choices"][0]["token_ids"] == [72, 101]
    assert [entry and list(entry) for entry in reply["prompt_logprobs"]] == [None, *([str(i)] for i in prompt[1:])]
