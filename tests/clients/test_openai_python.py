"""OpenAI's Python client: chat, streams, tools, parsed answers, completions, embeddings, responses, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import KEY, MODEL, Server

QUESTION = [{"role": "user", "content": "Name a city by the sea."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Lisbon", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    name: Literal["Lisbon", "Oslo"]
    population: int
    coastal: bool


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.openai_url, api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": QUESTION, "max_tokens": 40, "seed": 7, "temperature": 1.0}
    whole = client.chat.completions.create(**options)
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    assert whole.choices[0].message.content
    assert streamed.choices[0].message.content == whole.choices[0].message.content
    assert streamed.choices[0].finish_reason == whole.choices[0].finish_reason


def test_many_answers_with_log_probabilities(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, logprobs=True, top_logprobs=4, max_tokens=12, temperature=1, seed=1
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    for choice in reply.choices:
        entries = choice.logprobs.content
        assert len(entries) == 12 or choice.finish_reason == "stop"
        assert all(len(entry.top_logprobs) == 4 for entry in entries)
        text = b"".join(bytes(entry.bytes or []) for entry in entries).decode(errors="replace")
        assert text.startswith(choice.message.content)


def test_a_pydantic_model_is_filled(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "A city as JSON."}], response_format=City, max_tokens=200,
        temperature=1, seed=3,
    )  # fmt: skip
    assert isinstance(reply.choices[0].message.parsed, City)


def test_a_tool_is_called_and_its_result_read(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "How is the weather in Oslo for 3 days?"}]
    first = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="required", max_tokens=200
    )
    assert first.choices[0].finish_reason == "tool_calls"
    call = first.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Lisbon", "Oslo")
    messages += [
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], max_tokens=20)
    assert second.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_streamed_arguments_are_those_of_the_whole_reply(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    options = {
        "model": MODEL, "messages": QUESTION, "tools": [WEATHER], "tool_choice": named, "max_tokens": 200, "seed": 5,
        "temperature": 1,
    }  # fmt: skip
    whole = client.chat.completions.create(**options)
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    function = streamed.choices[0].message.tool_calls[0].function
    assert function.arguments == whole.choices[0].message.tool_calls[0].function.arguments


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt=["The sea is", "The sky is"], max_tokens=8, n=2, logprobs=2, echo=True, temperature=1
    )
    assert [choice.text[:10] for choice in reply.choices] == ["The sea is"] * 2 + ["The sky is"] * 2
    assert reply.usage.completion_tokens <= 32


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["a ship at sea", "a boat on the ocean"]
    as_base64 = client.embeddings.create(model=MODEL, input=texts)  # what the client asks for by itself
    as_floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert len(as_base64.data) == 2
    for one, other in zip(as_base64.data, as_floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-6)
        assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-4)
    assert len(client.embeddings.create(model=MODEL, input=texts, dimensions=64).data[0].embedding) == 64


def test_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="Name a city.", max_output_tokens=20, temperature=0)
    assert first.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(
        model=MODEL, input="And another?", previous_response_id=first.id, max_output_tokens=10
    )
    assert second.usage.input_tokens > first.usage.total_tokens
    with client.responses.stream(model=MODEL, input="Name a city.", max_output_tokens=20, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == first.output_text
    parsed = client.responses.parse(model=MODEL, input="A city as JSON", text_format=City, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, City)


def test_errors_are_the_classes_that_programs_catch(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-none", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=QUESTION, top_p=9)
    assert refused.value.param == "top_p"
    with openai.OpenAI(base_url=server.openai_url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_many_at_once(server: Server) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=server.openai_url, api_key=KEY, max_retries=0) as client:

            async def ask(number: int) -> str:
                stream = await client.chat.completions.create(
                    model=MODEL, messages=QUESTION, max_tokens=20, seed=number % 4, temperature=1, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

            answers = await asyncio.gather(*(ask(i) for i in range(32)))
            assert answers[:4] * 8 == list(answers)  # the same request, the same bits, whatever the batch

    asyncio.run(main())
