"""Anthropic's Python client: messages, streams, tools, counting tokens, errors."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest

from tests.clients.conftest import KEY, MODEL, Server

QUESTION = [{"role": "user", "content": "Name a city by the sea."}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Lisbon", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


def test_a_streamed_message_is_the_whole_one_in_pieces(client: anthropic.Anthropic) -> None:
    greedy = {"temperature": 0}
    options = {"model": MODEL, "max_tokens": 30, "system": "Be brief.", "messages": QUESTION, "extra_body": greedy}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].text == text == final.content[0].text
    assert whole.stop_reason == final.stop_reason
    assert whole.usage.output_tokens == final.usage.output_tokens


def test_tokens_are_counted_as_they_are_charged(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens
    usage = client.messages.create(model=MODEL, max_tokens=1, messages=QUESTION).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_tool_is_called_and_its_result_read(client: anthropic.Anthropic) -> None:
    first = client.messages.create(
        model=MODEL, max_tokens=200, messages=QUESTION, tools=[WEATHER], tool_choice={"type": "any"}
    )
    assert first.stop_reason == "tool_use"
    call = next(block for block in first.content if block.type == "tool_use")
    assert call.name == "get_weather"
    assert call.input["city"] in ("Lisbon", "Oslo")
    messages = [
        *QUESTION,
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]},
    ]
    second = client.messages.create(model=MODEL, max_tokens=20, messages=messages, tools=[WEATHER])
    assert second.usage.input_tokens + (second.usage.cache_read_input_tokens or 0) > first.usage.input_tokens


def test_errors_are_the_classes_that_programs_catch(client: anthropic.Anthropic, server: Server) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="none", max_tokens=5, messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=MODEL, max_tokens=-1, messages=QUESTION)
    with anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.create(model=MODEL, max_tokens=5, messages=QUESTION)
