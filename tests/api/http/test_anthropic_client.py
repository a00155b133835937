"""Anthropic's Python client: messages, events, tools, counting; replies and events validated strictly by its models.

In `make test-clients`: the package is in the `clients` extra.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import ErrorResponse, Message, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

from servd.api.chat.plan import ChatPlan, plan_chat
from servd.api.http.routes import anthropic_messages
from servd.config import ServerConfig
from tests.api.http.test_responses import REPLIES, TagReader
from tests.fake_server import FakeServer

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
TOOL: Any = {
    "name": "weather",
    "description": "tells",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(autouse=True)
def tags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are read by TagReader, as a model's own parser would read them."""

    async def plan_with_tags(*args: Any) -> ChatPlan:
        plan = await plan_chat(*args)
        return ChatPlan(plan.prompt_token_ids, plan.params, TagReader)

    monkeypatch.setattr(anthropic_messages, "plan_chat", plan_with_tags)


def client_of(server: FakeServer, api_key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=api_key, max_retries=0)


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "max_tokens": 200, "messages": [{"role": "user", "content": text}]} | fields


def plain(message: Message) -> list[dict[str, Any]]:
    return [block.model_dump(exclude={"parsed_output"}) for block in message.content]


def test_create(tmp_path: Path) -> None:
    with FakeServer(tmp_path, replies=REPLIES) as server, client_of(server) as client:
        raw = client.messages.with_raw_response.create(**ask("greet"))
        Message.model_validate(json.loads(raw.text()), strict=True)
        message = raw.parse()
        assert message._request_id == raw.headers["x-request-id"]
        assert [block.text for block in message.content if block.type == "text"] == [REPLIES["greet"]]
        assert (message.stop_reason, message.usage.cache_read_input_tokens) == ("end_turn", 0)
        counted = client.messages.count_tokens(model="fake", messages=ask("greet")["messages"])
        assert counted.input_tokens == message.usage.input_tokens


def test_stream(tmp_path: Path) -> None:
    with FakeServer(tmp_path, replies=REPLIES, step_delay=0.001) as server, client_of(server) as client:
        with client.messages.stream(**ask("greet")) as stream:
            assert "".join(stream.text_stream) == REPLIES["greet"]
            final = stream.get_final_message()
        assert final.stop_reason == "end_turn" and final.usage.output_tokens == len(REPLIES["greet"].encode()) + 1
        again = client.messages.create(**ask("greet"))
        assert again.usage.cache_read_input_tokens and plain(again) == plain(final)
        with client.messages.with_streaming_response.create(**ask("weather", stream=True)) as reply:
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
        for line in lines:
            if json.loads(line)["type"] != "ping":  # its models do not know it
                EVENT.validate_python(json.loads(line), strict=True)


def test_tools_and_thinking(tmp_path: Path) -> None:
    with FakeServer(tmp_path, replies=REPLIES, step_delay=0.001) as server, client_of(server) as client:
        thinking: Any = {"type": "adaptive"}
        first = client.messages.create(**ask("weather", tools=[TOOL], thinking=thinking))
        assert first.stop_reason == "tool_use"
        with client.messages.stream(**ask("weather", tools=[TOOL], thinking=thinking)) as stream:
            final = stream.get_final_message()
        assert plain(final) == plain(first)
        thought, text, *calls = first.content
        assert (thought.type, text.type) == ("thinking", "text")
        assert [call.input for call in calls if call.type == "tool_use"] == [{"city": "Oslo"}, {"city": "Rome"}]
        call_ids = [call.id for call in calls if call.type == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": call_id, "content": "sun"} for call_id in call_ids]
        history = [*ask("weather")["messages"], {"role": "assistant", "content": first.content}]
        history.append({"role": "user", "content": results})
        second = client.messages.create(model="fake", max_tokens=9, messages=history, tools=[TOOL])
        assert second.usage.output_tokens == 9


class Person(BaseModel):
    name: str


def test_parse(tmp_path: Path) -> None:
    with FakeServer(tmp_path, replies=REPLIES) as server, client_of(server) as client:
        parsed = client.messages.parse(**ask("object"), output_format=Person)
        assert parsed.parsed_output == Person(name="Ann")


def test_errors(tmp_path: Path) -> None:
    with FakeServer(tmp_path, replies=REPLIES, step_delay=0.002) as server, client_of(server) as client:
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(**ask("x", max_tokens=10_000))
        ErrorResponse.model_validate(refused.value.body, strict=True)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**ask("x", model="other"))
        with pytest.raises(anthropic.APIStatusError) as failed:
            with client.messages.stream(**ask("no end"), extra_body={"deadline_ms": 30}) as stream:
                stream.until_done()
        assert "deadline" in str(failed.value)
    with FakeServer(tmp_path, ServerConfig(port=0, api_key="secret")) as server, client_of(server, "wrong") as client:
        with pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**ask("x"))
