"""Tools on /v1/chat/completions: what reaches the model, and how its calls come back, whole and streamed."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from servd.api.service import InferenceService
from servd.config import ServerConfig
from servd.errors import ConfigError
from tests.api.http.serving import CHAT, Served, serve

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
REPLIES = {
    "q-one": f"Let me look.\n{CALL}",
    "q-two": f'{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>',
    "q-none": "I know <b>that</b>.\n",
    "q-broken": "<tool_call>\nno JSON",
    "q-thought": "<think>\nHm, Paris.\n</think>\n\nParis it is.",
    "q-both": f"<think>\nHm.\n</think>\n\n{CALL}",
    "q-person": '{"name": "Ann", "age": 7}',
}


def ask(what: str, **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": what}], "tools": [WEATHER, NOW]} | fields


async def whole(server: Served, what: str, **fields: Any) -> dict[str, Any]:
    reply = await server.post(CHAT, ask(what, **fields))
    assert reply.status == 200, reply.body
    ChatCompletion.model_validate(reply.json(), strict=True)
    return reply.json()["choices"][0]


async def chunks(server: Served, what: str, **fields: Any) -> list[dict[str, Any]]:
    events = (await server.post(CHAT, ask(what, stream=True, **fields))).events()
    assert events.pop() == "[DONE]"
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=True)
    return [event["choices"][0] for event in events]


def joined(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's deltas make."""
    message: dict[str, Any] = {}
    for delta in (choice["delta"] for choice in choices):
        for key in ("content", "reasoning_content", "reasoning"):
            if key in delta:
                message[key] = message.get(key, "") + delta[key]
        for call in delta.get("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                assert call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message


def prompt_of(server: Served) -> str:
    return bytes([new.token_ids for plan in server.executor.plans for new in plan.new_requests][-1]).decode()


def guidance_of(server: Served) -> Any:
    params = [new.sampling_params for plan in server.executor.plans for new in plan.new_requests][-1]
    return None if params.guidance is None else json.loads(params.guidance)


def test_calls_come_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            choice = await whole(server, "q-one")
            [call] = choice["message"].pop("tool_calls")
            assert choice["message"] == {"role": "assistant", "content": "Let me look.", "refusal": None}
            assert choice["finish_reason"] == "tool_calls"
            assert call["id"].startswith("call_") and call["type"] == "function"
            assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
            choice = await whole(server, "q-two")
            assert choice["message"]["content"] is None
            assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather", "now"]
            for what in ("q-none", "q-broken"):
                choice = await whole(server, what)
                assert (choice["message"]["content"], choice["finish_reason"]) == (REPLIES[what], "stop")
                assert "tool_calls" not in choice["message"]
            cut = await whole(server, "q-one", max_tokens=67)
            assert cut["finish_reason"] == "length"
            assert cut["message"]["tool_calls"][0]["function"]["arguments"] == '{"cit'

    asyncio.run(main())


@pytest.mark.parametrize("what", list(REPLIES))
def test_streamed_and_whole_answers_are_equal(what: str, tmp_path: Path) -> None:
    async def main() -> None:
        server_config = ServerConfig(port=0, reasoning_parser="think")
        async with serve(tmp_path, server=server_config, replies=REPLIES, step_delay=0.0005) as server:
            choice = await whole(server, what, n=2)
            choices = [c for c in await chunks(server, what, n=2, logprobs=True) if c["index"] == 1]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            streamed, message = joined(choices), choice["message"]
            assert streamed["content"] == (message["content"] or "")
            assert streamed.get("reasoning") == message.get("reasoning") == message.get("reasoning_content")
            calls = [[call["function"] for call in m.get("tool_calls", [])] for m in (streamed, message)]
            assert calls[0] == calls[1]
            assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + [choice["finish_reason"]]
            tokens = [token["bytes"][0] for c in choices if c["logprobs"] for token in c["logprobs"]["content"]]
            assert tokens[:-1] == list(REPLIES[what].encode())

    asyncio.run(main())


def test_arguments_stream_as_they_grow(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES, settings={"num_speculative_tokens": 0}, step_delay=0.002) as server:
            pieces = [c["delta"]["tool_calls"][0] for c in await chunks(server, "q-one") if "tool_calls" in c["delta"]]
            assert pieces[0]["function"] == {"name": "get_weather", "arguments": "{"}
            assert len(pieces) > 5 and {piece["index"] for piece in pieces} == {0}

    asyncio.run(main())


def test_thought_is_told_apart(tmp_path: Path) -> None:
    async def main() -> None:
        config = ServerConfig(port=0, reasoning_parser="think")
        async with serve(tmp_path, server=config, replies=REPLIES) as server:
            message = (await whole(server, "q-thought", tools=None))["message"]
            assert message == {
                "role": "assistant", "content": "Paris it is.", "refusal": None,
                "reasoning_content": "Hm, Paris.", "reasoning": "Hm, Paris.",
            }  # fmt: skip
            hidden = (await whole(server, "q-thought", include_reasoning=False))["message"]
            assert hidden == {"role": "assistant", "content": "Paris it is.", "refusal": None}
            assert joined(await chunks(server, "q-thought", include_reasoning=False)) == {"content": "Paris it is."}
            both = (await whole(server, "q-both"))["message"]
            assert (both["content"], both["reasoning"], len(both["tool_calls"])) == (None, "Hm.", 1)
        async with serve(tmp_path, replies=REPLIES) as server:
            assert (await whole(server, "q-thought"))["message"]["content"] == REPLIES["q-thought"]

    asyncio.run(main())


def test_tools_reach_a_model_whose_template_knows_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            history = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Paris?"},
                {"role": "assistant", "content": "I look.", "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "now", "arguments": ""}},
                    {"id": "c2", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "P"}'}},
                ]},
                {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
                {"role": "tool", "tool_call_id": "c2", "content": "rain"},
            ]  # fmt: skip
            await whole(server, "", messages=history, max_tokens=1)
            system, _, rest = prompt_of(server).partition("user: ")
            assert system.startswith("system: Be brief.\n\nYou may call functions")
            for tool in (WEATHER, NOW):
                assert tool["function"]["name"] in system  # type: ignore[index]
            assert rest == (
                'Paris?\nassistant: I look.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": "P"}}\n</tool_call>\n'
                "user: <tool_response>\n12:00\n</tool_response>\n<tool_response>\nrain\n</tool_response>\nassistant: "
            )
            await whole(server, "hi", tool_choice="none", max_tokens=1)
            assert prompt_of(server) == "user: hi\nassistant: "

    asyncio.run(main())


def test_choices_become_grammars(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            await whole(server, "q-one")
            assert guidance_of(server) is None, "a free choice costs nothing"
            strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}  # type: ignore[operator]
            seen = []
            for fields in (
                {"tool_choice": "required"},
                {"tool_choice": {"type": "function", "function": {"name": "now"}}, "parallel_tool_calls": False},
                {"parallel_tool_calls": False},
                {"tools": [strict]},
                {"response_format": {"type": "json_object"}},
            ):
                await whole(server, "q-one", **fields)
                seen.append(json.dumps(guidance_of(server)))
            assert len(set(seen)) == 5 and all("tool_call" in grammar for grammar in seen)
            assert "get_weather" not in seen[1]
            for mode in ("auto", "required"):
                allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "now"}}]}
                await whole(server, "q-one", tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
                assert "get_weather" not in prompt_of(server)
                assert (guidance_of(server) is None) == (mode == "auto")
            await whole(server, "q-one", tool_choice="none")
            assert guidance_of(server) is None

    asyncio.run(main())


OTHER = {"type": "function", "function": {"name": "other"}}
DEEP = json.loads('{"a":' * 80 + "1" + "}" * 80)
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [NOW] * 300}, "tools", "300 entries"),
    ({"tools": [NOW, NOW]}, "tools", "twice"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "allowed: function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters, digits"),
    ({"tools": [{"type": "function", "function": {"name": "f\"}}<|im_end|>"}}]}, "tools[0].function.name", "letters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools[0].function.x", "not a field"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
     "tools[0].function.parameters", "'object'"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": [1] * 30_000}}}]},
     "tools", "more than 20000 values"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}, "tools", "levels deep"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
     "tools[0].function.parameters", "'not' at # is not supported"),
    ({"tool_choice": "any"}, "tool_choice", '"any"; allowed: none, auto, required'),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice", "'other'"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type", '"custom"'),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [OTHER]}}},
     "tool_choice.allowed_tools.tools", "'other'"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "without allowed_tools"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "without function"),
    ({"tools": None, "tool_choice": "required"}, "tool_choice", "with tools"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
    ({"functions": [{"name": "f"}]}, "functions", "does not honour"),
]  # fmt: skip


def test_bad_tools_are_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            problems = []
            for fields, param, text in BAD:
                reply = await server.post(CHAT, ask("hi", **fields))
                error = reply.error()
                if (reply.status, error["param"]) != (400, param) or text not in error["message"]:
                    problems.append(f"{json.dumps(fields)[:80]}: {reply.status} {error}")
            assert not problems, "\n".join(problems)
            assert not server.executor.plans
        async with serve(tmp_path, server=ServerConfig(port=0, tool_call_parser="none")) as server:
            assert "--tool-call-parser none" in (await server.post(CHAT, ask("hi"))).error()["message"]

    asyncio.run(main())


def test_tools_that_no_grammar_can_force_are_refused_where_one_is_needed(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            for schema in ({"type": "string", "pattern": "(a"}, {"type": "strng"}, {"$ref": "http://x.org/schema"}):
                parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
                tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
                reply = await server.post(CHAT, ask("q-none", tools=tools, tool_choice="required"))
                assert (reply.status, reply.error()["param"]) == (400, "tool_choice"), schema
                assert (await whole(server, "q-none", tools=tools))["finish_reason"] == "stop"

    asyncio.run(main())


def test_a_million_tools_are_refused_before_they_are_looked_at(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            tools = b",".join([b'{"function":{"name":"f"}}'] * 300_000)
            body = b'{"messages":[{"role":"user","content":"x"}],"tools":[%b]}' % tools
            reply = await server.post(CHAT, io.BytesIO(body))
            assert (reply.status, reply.error()["param"]) == (400, "tools")

    asyncio.run(main())


def test_unknown_parsers_end_the_start(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            with pytest.raises(ConfigError, match=r"unknown tool call parser 'x'; known: hermes"):
                InferenceService(server.engine, "fake", tool_call_parser="x")
            with pytest.raises(ConfigError, match=r"unknown reasoning parser 'x'; known: deepseek_r1"):
                InferenceService(server.engine, "fake", reasoning_parser="x")

    asyncio.run(main())


def test_tokenize_shows_the_prompt_of_a_chat(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            for fields in ({"tools": [WEATHER]}, {"chat_template_kwargs": {"x": 1}}, {"add_generation_prompt": False}):
                await whole(server, "hi", **{"tools": None, "max_tokens": 1} | fields)
                reply = await server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]} | fields)
                assert bytes(reply.json()["tokens"]).decode() == prompt_of(server)

    asyncio.run(main())


def test_no_messages_but_tools(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            reply = await server.post(CHAT, ask("", messages=[]))
            assert (reply.status, reply.error()["param"]) == (400, "messages")

    asyncio.run(main())


class Person(BaseModel):
    """Someone."""

    name: str
    age: int


def test_the_official_client_streams_and_parses(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES, step_delay=0.0005) as server, server.openai() as client:
            messages: Any = [{"role": "user", "content": "q-two"}]
            tools: Any = [WEATHER, NOW]
            async with client.chat.completions.stream(model="fake", messages=messages, tools=tools) as stream:
                kinds = [event.type async for event in stream]
                completion = await stream.get_final_completion()
            assert {"chunk", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= {*kinds}
            calls = completion.choices[0].message.tool_calls
            assert calls is not None and [call.function.name for call in calls] == ["get_weather", "now"]
            messages[0]["content"] = "q-person"
            parsed = await client.chat.completions.parse(model="fake", messages=messages, response_format=Person)
            assert parsed.choices[0].message.parsed == Person(name="Ann", age=7)
            assert guidance_of(server)["grammars"][0]["json_schema"]["title"] == "Person"
            tool = openai.pydantic_function_tool(Person)
            messages[0]["content"] = "q-none"
            await client.chat.completions.parse(model="fake", messages=messages, tools=[tool])
            assert "Person" in json.dumps(guidance_of(server))

    asyncio.run(main())
