"""/v1/responses on the wire and through the official client: every reply and event is validated strictly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from servd.api.chat.parts import Part, ReasoningPart, TextPart, ToolCallPart
from servd.api.chat.plan import ChatPlan, plan_chat
from servd.api.http.responses.items import read_input, template_messages
from servd.api.http.routes import responses
from tests.api.http.serving import CHAT, Reply, Served, serve

PATH = "/v1/responses"
REPLIES = {
    "greet": "Hello, 世界 😀!",
    "weather": '<think>hot?</think>I look.<call>{"city":"Oslo"}</call><call>{"city":"Rome"}</call>',
    "silent": "",
    "object": '{"name":"Ann"}',
}
ASK = {"model": "fake", "input": "greet"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


class TagReader:
    """Reads <think>…</think> and <call>…</call>; pieces come as they grow, tags never."""

    KINDS = {"<think>": "think", "</think>": "text", "<call>": "call", "</call>": "text"}

    def __init__(self) -> None:
        self._held, self._kind, self._calls, self._named = "", "text", -1, False

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while self._held:
            cut = self._held.find("<")
            if cut:
                piece = self._held if cut < 0 else self._held[:cut]
                self._held = self._held[len(piece) :]
                parts.append(self._part(piece))
                continue
            tag = self._held.partition(">")
            if not tag[1]:
                break
            self._kind, self._held, self._named = self.KINDS[tag[0] + ">"], tag[2], False
            self._calls += self._kind == "call"
        return parts

    def finish(self) -> list[Part]:
        return []

    def _part(self, piece: str) -> Part:
        if self._kind == "think":
            return ReasoningPart(piece)
        if self._kind == "text":
            return TextPart(piece)
        named, self._named = self._named, True
        if named:
            return ToolCallPart(self._calls, piece)
        return ToolCallPart(self._calls, piece, f"call_{self._calls}", "weather")


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are read by TagReader, as a model's own parser would read them."""

    async def plan_with_tags(*args: Any) -> ChatPlan:
        plan = await plan_chat(*args)
        return ChatPlan(plan.prompt_token_ids, plan.params, TagReader)

    monkeypatch.setattr(responses, "plan_chat", plan_with_tags)


def run(folder: Path, main: Callable[[Served], Any], **options: Any) -> Any:
    async def with_server() -> Any:
        async with serve(folder, **{"replies": REPLIES, **options}) as server:
            return await main(server)

    return asyncio.run(with_server())


async def respond(server: Served, **fields: Any) -> dict[str, Any]:
    reply = await server.post(PATH, ASK | fields)
    return checked(reply)


def checked(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply.body
    value: dict[str, Any] = reply.json()
    Response.model_validate(value, strict=True)
    return value


def named_events(reply: Reply, first: int = 0) -> list[dict[str, Any]]:
    """The events of a stream: each valid, its name the same as its type, numbered without a gap."""
    assert reply.headers["Content-Type"].startswith("text/event-stream"), reply.body
    events = []
    for number, text in enumerate(reply.body.decode().split("\n\n")[:-1], start=first):
        id_line, event_line, data_line = text.split("\n")
        event = json.loads(data_line.removeprefix("data: "))
        assert event_line == f"event: {event['type']}"
        assert event["sequence_number"] == number and id_line.endswith(f":{number + 1}")
        EVENT.validate_python(event, strict=True)
        events.append(event)
    return events


async def streamed(server: Served, **fields: Any) -> list[dict[str, Any]]:
    return named_events(await server.post(PATH, ASK | {"stream": True} | fields))


def text_of(response: dict[str, Any]) -> str:
    return "".join(p["text"] for item in response["output"] if item["type"] == "message" for p in item["content"])


def prompt_of(server: Served) -> str:
    """The prompt of the last request that reached the model."""
    token_ids = [new.token_ids for plan in server.executor.plans for new in plan.new_requests][-1]
    return bytes(token_ids).decode()


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in response.items() if k not in ("id", "created_at", "completed_at")}
    return kept | {"output": [{k: v for k, v in item.items() if k != "id"} for item in response["output"]]}


def test_reply(tmp_path: Path) -> None:
    async def main(server: Served) -> dict[str, Any]:
        return await respond(server, metadata={"a": "b"}, user="u", temperature=0.5, max_output_tokens=100)

    reply = run(tmp_path, main)
    [message] = reply["output"]
    assert message["content"] == [
        {"type": "output_text", "text": REPLIES["greet"], "annotations": [], "logprobs": []}
    ]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert (reply["status"], reply["error"], reply["incomplete_details"]) == ("completed", None, None)
    assert reply["completed_at"] >= reply["created_at"]
    assert (reply["metadata"], reply["user"], reply["temperature"]) == ({"a": "b"}, "u", 0.5)
    num_output = len(REPLIES["greet"].encode()) + 1
    num_input = len(b"user: greet\nassistant: ")
    assert reply["usage"] == {
        "input_tokens": num_input, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": num_output, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input + num_output,
    }  # fmt: skip


def test_the_same_tokens_as_a_chat_completion(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a\nb"}]
        parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
        for fields in ({"temperature": 0}, {"seed": 7}, {"seed": 7, "top_k": 3, "stop": ["q"]}):
            chat = await server.post(CHAT, {"messages": messages, "max_tokens": 40} | fields)
            expected = chat.json()["choices"][0]["message"]["content"]
            instructed = {"instructions": "be brief", "input": [{"role": "user", "content": parts}]}
            whole = await respond(server, max_output_tokens=40, **instructed, **fields)
            developer = [{"type": "message", "role": "developer", "content": "be brief"}, messages[1]]
            events = await streamed(server, max_output_tokens=40, input=developer, **fields)
            assert text_of(whole) == text_of(events[-1]["response"]) == expected

    run(tmp_path, main)


def test_a_long_answer_is_incomplete(tmp_path: Path) -> None:
    async def main(server: Served) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        fields = {"max_output_tokens": 5, "input": "no end"}
        return await respond(server, **fields), await streamed(server, **fields)

    reply, events = run(tmp_path, main)
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert reply["output"][0]["status"] == "incomplete" and reply["completed_at"] is None
    assert len(text_of(reply)) == 5 == reply["usage"]["output_tokens"]
    assert events[-1]["type"] == "response.incomplete"


def test_events_of_text(tmp_path: Path) -> None:
    async def main(server: Served) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return await streamed(server), await respond(server)

    events, whole = run(tmp_path, main, step_delay=0.001)
    types = [event["type"] for event in events]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert types == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(deltas) == REPLIES["greet"] == events[-4]["text"]
    assert without_ids(events[-1]["response"])["output"] == without_ids(whole)["output"]
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"


def test_an_answer_of_no_text_is_an_empty_message(tmp_path: Path) -> None:
    async def main(server: Served) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return await respond(server, input="silent"), await streamed(server, input="silent")

    reply, events = run(tmp_path, main)
    assert [item["content"][0]["text"] for item in reply["output"]] == [""]
    assert [event["type"] for event in events][-4:-2] == ["response.output_text.done", "response.content_part.done"]


@pytest.mark.usefixtures("tags")
def test_reasoning_and_calls(tmp_path: Path) -> None:
    async def main(server: Served) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return await respond(server, input="weather"), await streamed(server, input="weather")

    reply, events = run(tmp_path, main, step_delay=0.001)
    reasoning, message, *calls = reply["output"]
    assert reasoning["type"] == "reasoning" and reasoning["summary"] == []
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hot?"}]
    assert message["content"][0]["text"] == "I look."
    assert [(c["call_id"], c["name"], json.loads(c["arguments"])["city"]) for c in calls] == [
        ("call_0", "weather", "Oslo"), ("call_1", "weather", "Rome"),
    ]  # fmt: skip
    assert reply["usage"]["output_tokens_details"] == {"reasoning_tokens": 4}
    assert without_ids(events[-1]["response"])["output"] == without_ids(reply)["output"]
    for index, item in enumerate(reply["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added" and own[0]["item"]["status"] == "in_progress"
        assert own[-1]["type"] == "response.output_item.done"
        assert without_ids({"output": [own[-1]["item"]]}) == without_ids({"output": [item]})
        text = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        assert {event["item_id"] for event in own[1:-1]} == {own[0]["item"]["id"]}


def test_items_become_messages() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "I look", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}', "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "43"}]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "more"},
    ]  # fmt: skip

    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"id": "c2", "type": "function", "function": {"name": "f", "arguments": {}}},
    ]
    assert template_messages("be brief", read_input(items, str)) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "I look", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "tool", "content": "43", "tool_call_id": "c2"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "more"},
    ]


def test_logprobs(tmp_path: Path) -> None:
    async def main(server: Served) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        return await respond(server, **fields), await streamed(server, **fields)

    reply, events = run(tmp_path, main)
    logprobs = reply["output"][0]["content"][0]["logprobs"]
    assert bytes(b for entry in logprobs[:-1] for b in entry["bytes"]).decode() == REPLIES["greet"]
    assert {len(entry["top_logprobs"]) for entry in logprobs} == {2}
    in_deltas = [e for event in events if event["type"] == "response.output_text.delta" for e in event["logprobs"]]
    assert in_deltas == logprobs


def test_it_goes_on_from_a_previous_response(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        first = await respond(server, instructions="be brief")
        second = await respond(server, input="and?", previous_response_id=first["id"], max_output_tokens=1)
        assert second["previous_response_id"] == first["id"]
        assert prompt_of(server) == f"user: greet\nassistant: {REPLIES['greet']}\nuser: and?\nassistant: "
        await respond(server, input="so", previous_response_id=second["id"], max_output_tokens=1)
        assert prompt_of(server).startswith(f"user: greet\nassistant: {REPLIES['greet']}\nuser: and?\nassistant: ")
        third = await server.request("GET", f"{PATH}/{second['id']}/input_items?order=asc&limit=2")
        page = third.json()
        assert [item["content"][0]["text"] for item in page["data"]] == ["greet", REPLIES["greet"]]
        assert page["has_more"] is True and page["last_id"] == page["data"][-1]["id"]
        unstored = await respond(server, store=False)
        assert unstored["store"] is False
        gone = await server.post(PATH, ASK | {"previous_response_id": unstored["id"]})
        assert (gone.status, gone.error()["param"]) == (404, "previous_response_id")

    run(tmp_path, main)


@pytest.mark.usefixtures("tags")
def test_calls_and_their_results_go_on_from_a_previous_response(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        first = await respond(server, input="weather")
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "sun"}
            for item in first["output"] if item["type"] == "function_call"
        ]  # fmt: skip
        await respond(server, input=results, previous_response_id=first["id"], max_output_tokens=1)
        prompt = prompt_of(server)
        assert prompt.startswith("user: weather\nassistant: I look.") and prompt.count("sun") == 2

    run(tmp_path, main)


def test_retrieve_and_delete(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        made = await respond(server)
        path = f"{PATH}/{made['id']}"
        assert checked(await server.request("GET", path)) == made
        streamed_one = (await streamed(server))[-1]["response"]
        assert checked(await server.request("GET", f"{PATH}/{streamed_one['id']}")) == streamed_one
        deleted = await server.request("DELETE", path)
        assert deleted.json() == {"id": made["id"], "object": "response", "deleted": True}
        for method, tail in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            reply = await server.request(method, path + tail)
            assert (reply.status, reply.error()["code"]) == (404, "response_not_found")

    run(tmp_path, main)


class Person(BaseModel):
    name: str


def test_the_official_client(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        async with server.openai() as client:
            made = await client.responses.create(model="fake", input="greet")
            assert made.output_text == REPLIES["greet"]
            again = await client.responses.retrieve(made.id)
            assert again == made
            items = [item async for item in await client.responses.input_items.list(made.id)]
            assert items[0].to_dict()["content"] == [{"type": "input_text", "text": "greet"}]
            async with client.responses.stream(model="fake", input="greet") as stream:
                seen = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
                final = await stream.get_final_response()
            assert seen == final.output_text == REPLIES["greet"]
            parsed = await client.responses.parse(model="fake", input="object", text_format=Person)
            assert parsed.output_parsed == Person(name="Ann")
            counted = await client.responses.input_tokens.count(model="fake", input="greet", instructions="be brief")
            assert counted.input_tokens == len(b"system: be brief\nuser: greet\nassistant: ")
            await client.responses.delete(made.id)

    run(tmp_path, main)


@pytest.mark.usefixtures("tags")
def test_the_official_client_calls_tools(tmp_path: Path) -> None:
    tool: dict[str, Any] = {
        "type": "function", "name": "weather", "description": "tells", "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
                       "additionalProperties": False},
    }  # fmt: skip

    async def main(server: Served) -> None:
        async with server.openai() as client:
            made = await client.responses.create(model="fake", input="weather", tools=[tool])
            calls = [item for item in made.output if item.type == "function_call"]
            assert [call.arguments for call in calls] == ['{"city":"Oslo"}', '{"city":"Rome"}']
            history: list[Any] = [{"role": "user", "content": "weather"}, *made.output]
            history += [{"type": "function_call_output", "call_id": c.call_id, "output": "sun"} for c in calls]
            await client.responses.create(model="fake", input=history, tools=[tool], max_output_tokens=1)
            assert prompt_of(server).count("sun\n") == 2
            async with client.responses.stream(model="fake", input="weather", tools=[tool]) as stream:
                final = await stream.get_final_response()
            parsed = [item for item in final.output if item.type == "function_call"]
            assert [call.parsed_arguments for call in parsed] == [{"city": "Oslo"}, {"city": "Rome"}]

    run(tmp_path, main)


@pytest.mark.parametrize(
    ("schema", "given", "strict"),
    [
        ({"type": "object", "properties": {"city": {"type": "string"}}}, None, True),
        ({"type": "object", "properties": {"city": {"type": "string"}}}, False, False),
        ({"type": "object", "unevaluatedItems": False}, None, False),
        ({"type": "object", "unevaluatedItems": False}, False, False),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("tags")
def test_functions_are_strict_unless_told_otherwise_where_their_schema_permits(
    tmp_path: Path, schema: dict[str, Any], given: bool | None, strict: bool
) -> None:
    async def main(server: Served) -> None:
        tool = {"type": "function", "name": "weather", "parameters": schema, "strict": given}
        reply = await server.post("/v1/responses", {"input": "weather", "tools": [tool]})
        assert (reply.status, reply.json()["tools"][0]["strict"]) == (200, strict)
        guidance = server.executor.plans[0].new_requests[0].sampling_params.guidance
        assert (guidance is not None and "city" in guidance) is strict

    run(tmp_path, main)
