"""One conversation in the three chat dialects: the same prompt, settings, grammar and answer, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from servd.config import ServerConfig
from servd.outputs import NewRequestData
from tests.api.http import test_messages, test_responses
from tests.api.http.serving import CHAT, Served, serve
from tests.api.http.test_messages import PATH as MESSAGES
from tests.api.http.test_responses import PATH as RESPONSES
from tests.api.http.test_tools import REPLIES

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "The weather of a city."}
NOW = {"name": "now"}
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
CHAT_TOOLS = [
    {"type": "function", "function": TOOL | {"parameters": PARAMETERS}},
    {"type": "function", "function": NOW | {"parameters": NO_PARAMETERS}},
]
FREE = {"type": "function", "strict": False}  # in Responses functions are strict unless told otherwise
RESPONSE_TOOLS = [FREE | TOOL | {"parameters": PARAMETERS}, FREE | NOW | {"parameters": NO_PARAMETERS}]
MESSAGE_TOOLS = [TOOL | {"input_schema": PARAMETERS}, NOW | {"input_schema": NO_PARAMETERS}]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}

# what is asked, and how: the fields in chat completions, responses and messages
Case = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]
SAME: list[Case] = [
    ("q-one", {}, {}, {}),
    ("q-two", {}, {}, {}),
    ("q-none", {}, {}, {}),
    ("q-broken", {}, {}, {}),
    ("q-thought", {}, {}, {}),
    ("q-both", {}, {}, {}),
    ("q-both", {"max_tokens": 50}, {"max_output_tokens": 50}, {"max_tokens": 50}),
    ("q-one", {"tool_choice": "required"}, {"tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
    ("q-one", {"tool_choice": "none"}, {"tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
    (
        "q-one",
        {"tool_choice": {"type": "function", "function": {"name": "now"}}, "parallel_tool_calls": False},
        {"tool_choice": {"type": "function", "name": "now"}, "parallel_tool_calls": False},
        {"tool_choice": {"type": "tool", "name": "now", "disable_parallel_tool_use": True}},
    ),
    (
        "q-person",
        {"tools": None, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        {"tools": None, "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
        {"tools": None, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ),
]


def last_request(server: Served) -> tuple[Any, ...]:
    """Prompt and settings of the last request that reached the model."""
    new: NewRequestData = [new for plan in server.executor.plans for new in plan.new_requests][-1]
    return new.token_ids[: new.num_prompt_tokens], new.sampling_params, new.max_total_tokens


def of_chat(reply: dict[str, Any]) -> tuple[Any, ...]:
    message = reply["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return (
        message.get("reasoning_content") or "", message["content"] or "",
        [(call["name"], json.loads(call["arguments"])) for call in calls],
        "cut" if reply["choices"][0]["finish_reason"] == "length" else "whole",
    )  # fmt: skip


def of_response(reply: dict[str, Any]) -> tuple[Any, ...]:
    texts = {"reasoning": "", "message": ""}
    calls = []
    for item in reply["output"]:
        if item["type"] == "function_call":
            calls.append((item["name"], json.loads(item["arguments"])))
        else:
            texts[item["type"]] += item["content"][0]["text"]
    status = {"completed": "whole", "incomplete": "cut"}[reply["status"]]
    return texts["reasoning"], texts["message"], calls, status


def of_message(reply: dict[str, Any]) -> tuple[Any, ...]:
    texts = {"thinking": "", "text": ""}
    calls = []
    for block in reply["content"]:
        if block["type"] == "tool_use":
            calls.append((block["name"], block["input"]))
        else:
            texts[block["type"]] += block[block["type"]]
    assert (reply["stop_reason"] == "tool_use") == bool(calls)
    return texts["thinking"], texts["text"], calls, "cut" if reply["stop_reason"] == "max_tokens" else "whole"


@pytest.mark.parametrize("case", SAME, ids=lambda case: case[0])
def test_the_same_in_all_dialects(tmp_path: Path, case: Case) -> None:
    what, in_chat, in_responses, in_messages = case

    async def main() -> None:
        config = ServerConfig(port=0, reasoning_parser="think")
        async with serve(tmp_path, server=config, replies=REPLIES) as server:
            shared = {"temperature": 0.5, "seed": 3}
            messages = [{"role": "user", "content": what}]
            chat = shared | {"messages": messages, "tools": CHAT_TOOLS, "max_tokens": 300} | in_chat
            reply = await server.post(CHAT, chat)
            expected, request = of_chat(reply.json()), last_request(server)
            response = shared | {"input": what, "tools": RESPONSE_TOOLS, "max_output_tokens": 300} | in_responses
            assert of_response(test_responses.checked(await server.post(RESPONSES, response))) == expected
            assert last_request(server) == request
            message = {"model": "fake", "messages": messages, "tools": MESSAGE_TOOLS, "max_tokens": 300}
            message |= shared | in_messages
            assert of_message((await server.post(MESSAGES, message)).json()) == expected
            assert last_request(server) == request
            events = test_responses.named_events(await server.post(RESPONSES, response | {"stream": True}))
            assert of_response(events[-1]["response"]) == expected
            assert last_request(server) == request
            events = test_messages.named_events(await server.post(MESSAGES, message | {"stream": True}))
            assert of_message(test_messages.assembled(events)) == expected
            assert last_request(server) == request

    asyncio.run(main())


def test_refusals_of_the_plan_speak_the_dialects_words(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            bad_tool = [{"type": "function", "name": "f", "parameters": {"type": "array"}}]
            for fields, param in (
                ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
                ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
                ({"tools": bad_tool}, "tools[0].parameters"),
                ({"tool_choice": "required"}, "tool_choice"),
                ({"input": test_responses.REPLIES["greet"] * 5000}, "input"),
            ):
                error = (await server.post(RESPONSES, {"input": "x"} | fields)).error()
                assert error["param"] == param and param in error["message"], error
            for fields, name in (
                ({"output_config": {"effort": "huge"}}, "output_config.effort"),
                ({"thinking": {"type": "enabled", "budget_tokens": 199}}, "thinking.type"),
                ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
                ({"tool_choice": {"type": "any"}}, "tool_choice"),
            ):
                refused = await server.post(MESSAGES, test_messages.ASK | fields)
                assert test_messages.error_of(refused)[2].startswith(name), refused.body

    asyncio.run(main())


def test_an_answer_goes_on_from_the_words_given_to_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies={"Once upon": " a time."}) as server:
            messages = [{"role": "user", "content": "tell"}, {"role": "assistant", "content": "Once upon"}]
            reply = await server.post(MESSAGES, test_messages.ASK | {"messages": messages})
            assert reply.json()["content"] == [{"type": "text", "text": " a time."}]
            assert test_responses.prompt_of(server).endswith("assistant: Once upon")

    asyncio.run(main())
