"""/v1/messages on the wire and through Anthropic's client where it is installed: replies, events and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servd.api.chat.plan import ChatPlan, plan_chat
from servd.api.http.anthropic.blocks import template_messages
from servd.api.http.routes import anthropic_messages
from servd.config import ServerConfig
from tests.api.http.serving import CHAT, Reply, Served, serve
from tests.api.http.test_disconnect import head_and_body
from tests.api.http.test_responses import REPLIES, TagReader, prompt_of

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
USER = {"role": "user", "content": "greet"}
ASK = {"model": "fake", "max_tokens": 200, "messages": [USER]}
TOOL = {"name": "weather", "description": "tells", "input_schema": {"type": "object"}}


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are read by TagReader, as a model's own parser would read them."""

    async def plan_with_tags(*args: Any) -> ChatPlan:
        plan = await plan_chat(*args)
        return ChatPlan(plan.prompt_token_ids, plan.params, TagReader)

    monkeypatch.setattr(anthropic_messages, "plan_chat", plan_with_tags)


def run(folder: Path, main: Callable[[Served], Any], **options: Any) -> Any:
    async def with_server() -> Any:
        async with serve(folder, **{"replies": REPLIES, **options}) as server:
            return await main(server)

    return asyncio.run(with_server())


def asked(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


async def message(server: Served, **fields: Any) -> dict[str, Any]:
    reply = await server.post(PATH, ASK | fields)
    assert reply.status == 200, reply.body
    value: dict[str, Any] = reply.json()
    assert value["id"].startswith("msg-") and reply.headers["request-id"]
    assert (value["type"], value["role"], value["model"]) == ("message", "assistant", "fake")
    return value


def named_events(reply: Reply) -> list[dict[str, Any]]:
    """The events of a stream, each with the name of its type."""
    assert reply.headers["Content-Type"].startswith("text/event-stream"), reply.body
    events = []
    for text in reply.body.decode().split("\n\n")[:-1]:
        _, event_line, data_line = text.split("\n")
        event = json.loads(data_line.removeprefix("data: "))
        assert event_line == f"event: {event['type']}"
        events.append(event)
    return events


async def streamed(server: Served, **fields: Any) -> list[dict[str, Any]]:
    return named_events(await server.post(PATH, ASK | {"stream": True} | fields))


def assembled(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's events tell of."""
    content: list[dict[str, Any]] = []
    pieces: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_start":
            content.append(event["content_block"])
        elif event["type"] == "content_block_delta" and event["delta"]["type"] != "signature_delta":
            [text] = [value for key, value in event["delta"].items() if key != "type"]
            pieces[event["index"]] = pieces.get(event["index"], "") + text
    for index, text in pieces.items():
        block = content[index]
        block |= {"input": json.loads(text)} if block["type"] == "tool_use" else {block["type"]: text}
    [end] = [event for event in events if event["type"] == "message_delta"]
    return events[0]["message"] | {"content": content} | end["delta"]


def error_of(reply: Reply) -> tuple[int, str, str]:
    """(status, type, message) of a reply in Anthropic's error shape, exactly."""
    body = reply.json()
    assert body.keys() == {"type", "error", "request_id"} and body["type"] == "error", body
    assert body["error"].keys() == {"type", "message"} and body["request_id"] == reply.headers["request-id"]
    return reply.status, body["error"]["type"], body["error"]["message"]


def test_reply(tmp_path: Path) -> None:
    reply = run(tmp_path, lambda server: message(server, system="be brief"))
    assert reply["content"] == [{"type": "text", "text": REPLIES["greet"]}]
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("end_turn", None)
    assert reply["usage"] == {
        "input_tokens": len(b"system: be brief\nuser: greet\nassistant: "), "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0, "output_tokens": len(REPLIES["greet"].encode()) + 1,
        "output_tokens_details": {"thinking_tokens": 0},
    }  # fmt: skip


def test_the_same_tokens_as_a_chat_completion(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a\nb"}]
        blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]
        for fields in ({"temperature": 0}, {"seed": 7}, {"seed": 7, "top_k": 3, "top_p": 0.5}):
            chat = await server.post(CHAT, {"messages": messages, "max_tokens": 40} | fields)
            expected = chat.json()["choices"][0]["message"]["content"]
            whole = await message(
                server, max_tokens=40, system="be brief", messages=[{"role": "user", "content": blocks}], **fields
            )
            system = [{"type": "text", "text": "be brief"}]
            events = await streamed(server, max_tokens=40, system=system, messages=messages[1:], **fields)
            deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
            assert whole["content"][0]["text"] == "".join(deltas) == expected

    run(tmp_path, main)


def test_how_an_answer_ends(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        cut = await message(server, max_tokens=5)
        assert (cut["stop_reason"], cut["content"][0]["text"]) == ("max_tokens", "Hello")
        stopped = await message(server, stop_sequences=["zzz", "lo"])
        assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "lo")
        assert stopped["content"][0]["text"] == "Hel"
        assert (await message(server, **asked("silent")))["content"] == []

    run(tmp_path, main)


def test_events_of_text(tmp_path: Path) -> None:
    async def main(server: Served) -> list[dict[str, Any]]:
        return await streamed(server)

    events = run(tmp_path, main, step_delay=0.001)
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    assert [event["type"] for event in events] == [
        "message_start", "ping", "content_block_start", *["content_block_delta"] * len(deltas),
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert start["usage"]["input_tokens"] == len(b"user: greet\nassistant: ")
    assert events[2]["content_block"] == {"type": "text", "text": ""}
    assert "".join(event["delta"]["text"] for event in deltas) == REPLIES["greet"]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == len(REPLIES["greet"].encode()) + 1


@pytest.mark.usefixtures("tags")
def test_thinking_and_calls(tmp_path: Path) -> None:
    async def main(server: Served) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return await message(server, **asked("weather")), await streamed(server, **asked("weather"))

    reply, events = run(tmp_path, main, step_delay=0.001)
    assert reply["content"] == [
        {"type": "thinking", "thinking": "hot?", "signature": ""},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "call_0", "name": "weather", "input": {"city": "Oslo"}},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}},
    ]
    assert reply["stop_reason"] == "tool_use" == events[-2]["delta"]["stop_reason"]
    assert reply["usage"]["output_tokens_details"] == {"thinking_tokens": 4}
    for index, block in enumerate(reply["content"]):
        own = [event for event in events if event.get("index") == index]
        assert (own[0]["type"], own[-1]["type"]) == ("content_block_start", "content_block_stop")
        assert own[0]["content_block"]["type"] == block["type"]
        deltas = [event["delta"] for event in own[1:-1]]
        if block["type"] == "thinking":
            assert deltas.pop() == {"type": "signature_delta", "signature": ""}
        joined = "".join(delta.get("text") or delta.get("thinking") or delta.get("partial_json") for delta in deltas)
        assert (json.loads(joined) if block["type"] == "tool_use" else joined) == block[
            {"tool_use": "input"}.get(block["type"], block["type"])
        ]


def test_blocks_become_messages(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "I look"},
            {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
            {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "sun"},
            {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "none"}],
             "is_error": True},
            {"type": "text", "text": "and?"},
        ]},
    ]  # fmt: skip

    calls = [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
        {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": {}}},
    ]
    assert template_messages([{"type": "text", "text": "be brief"}], messages) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "I look", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "sun", "tool_call_id": "c1"},
        {"role": "tool", "content": "Error: none", "tool_call_id": "c2"},
        {"role": "user", "content": "and?"},
    ]

    async def main(server: Served) -> None:
        await message(server, messages=messages, max_tokens=1, tools=[TOOL])
        counted = await server.post(COUNT, {"model": "fake", "messages": messages, "tools": [TOOL]})
        assert counted.json() == {"input_tokens": len(prompt_of(server).encode())}

    run(tmp_path, main)


THINK = "thinking.budget_tokens"
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": "x"}

# fields → what the error's message begins with
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [USER | {"content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [USER | {"content": [{"type": "document", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [USER | {"content": [RESULT | {"content": [{"type": "image"}]}]}]},
     "messages[0].content[0].content[0].type"),
    ({"messages": [USER | {"content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "messages[0].content[0].type"),
    ({"messages": [USER | {"content": [{"type": "text", "text": "x", "cache_control": {"type": "y"}}]}]},
     "messages[0].content[0].cache_control.type"),
    ({"messages": [USER] * 5000}, "messages"),
    ({"messages": asked("x" * 100_000)["messages"]}, "messages"),
    ({"system": [{"type": "image"}]}, "system[0].type"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_k": -5}, "top_k"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL | {"input_examples": [{}]}]}, "tools[0].input_examples"),
    ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
    ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {"type": "enabled"}}, THINK),
    ({"thinking": {"type": "enabled", "budget_tokens": 100}}, THINK),
    ({"thinking": {"type": "enabled", "budget_tokens": 199, "display": "omitted"}}, "thinking.display"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format.type"),
    ({"container": "c"}, "container"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"nonsense": 1}, "nonsense"),
]  # fmt: skip


def test_refusals_name_the_field(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        for fields, name in REFUSED:
            for stream in (False, True):
                reply = await server.post(PATH, ASK | {"stream": stream} | fields)
                status, kind, text = error_of(reply)
                assert (status, kind) == (400, "invalid_request_error"), (fields, reply.body)
                assert text.startswith(name), (fields, text)

    run(tmp_path, main)


def test_what_changes_nothing_is_taken(tmp_path: Path) -> None:
    neutral: dict[str, Any] = {
        "metadata": {"user_id": "u"}, "service_tier": "auto", "tools": [], "stop_sequences": [], "speed": "standard",
        "cache_control": {"type": "ephemeral", "ttl": "1h"}, "container": None, "stream": False,
        "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "citations": None}],
    }  # fmt: skip

    async def main(server: Served) -> int:
        return (await server.post(PATH, ASK | neutral, headers={"anthropic-version": "2023-06-01"})).status

    assert run(tmp_path, main) == 200


def test_all_errors_have_anthropics_shape(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        assert error_of(await server.post(PATH, ASK | {"model": "other"}))[:2] == (404, "not_found_error")
        assert error_of(await server.post(PATH, b"{"))[:2] == (400, "invalid_request_error")
        assert error_of(await server.post(PATH, b" " * 2000))[:2] == (413, "request_too_large")
        assert error_of(await server.post(f"{PATH}/batches", {}))[:2] == (404, "not_found_error")
        assert error_of(await server.request("GET", PATH))[:2] == (405, "invalid_request_error")
        slow = await server.post(PATH, ASK | asked("no end") | {"deadline_ms": 50})
        assert error_of(slow)[:2] == (408, "timeout_error")
        await server.fake.wait_idle()
        waiting = [asyncio.create_task(server.post(PATH, ASK | asked("no end")))]
        await server.fake.wait_until(lambda: server.engine.stats().running == 1)
        waiting.append(asyncio.create_task(server.post(PATH, ASK)))
        await server.fake.wait_until(lambda: server.engine.stats().waiting == 1)
        full = await server.post(PATH, ASK)
        assert error_of(full)[:2] == (429, "rate_limit_error") and full.headers["Retry-After"] == "1"
        assert [reply.status for reply in await asyncio.gather(*waiting)] == [200, 200]
        assert list((await server.post(CHAT, {})).json()["error"]) == ["message", "type", "param", "code"]

    limits = {"max_num_seqs": 1, "max_num_queued_reqs": 1}
    run(tmp_path, main, server=ServerConfig(port=0, max_body_bytes=1000), settings=limits, step_delay=0.002)


def test_a_missing_key_is_told_in_anthropics_shape(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        for method, path in (("POST", PATH), ("POST", COUNT), ("GET", PATH), ("GET", f"{PATH}/nope")):
            reply = await server.request(method, path, json=ASK)
            assert error_of(reply)[:2] == (401, "authentication_error")
            assert reply.headers["WWW-Authenticate"] == "Bearer" and b"secret" not in reply.body

    run(tmp_path, main, server=ServerConfig(port=0, api_key="secret"))


def test_a_failure_in_mid_stream_is_told(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        events = await streamed(server, **asked("no end"), max_tokens=1900, deadline_ms=500)
        assert events[0]["type"] == "message_start" and events[-1]["type"] == "error"
        assert events[-1]["error"]["type"] == "timeout_error"

    run(tmp_path, main, step_delay=0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_request(tmp_path: Path, stream: bool) -> None:
    async def main(server: Served) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head_and_body(PATH, ASK | asked("no end") | {"max_tokens": 1900, "stream": stream}))
        await server.fake.wait_until(lambda: server.engine.stats().running == 1)
        writer.close()
        await server.fake.wait_idle(seconds=2)

    run(tmp_path, main, step_delay=0.002)
