"""Tools and answer formats with a real model, which knows neither, at temperature 1: what comes back is well formed."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.e2e.conftest import Server

MODEL = "smollm2-135m-instruct"
ASK: Any = [{"role": "user", "content": "What is the weather in Paris tomorrow, and what time is it there?"}]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
            "unit": {"enum": ["C", "F"]},
        },
        "required": ["city", "unit"],
    },
}
TOOLS: Any = [
    {"type": "function", "function": WEATHER},
    {"type": "function", "function": {"name": "now", "description": "The time.", "strict": True}},
]


class City(BaseModel):
    """A city."""

    name: str
    is_capital: bool


def check_call(name: str, arguments: str) -> None:
    values = json.loads(arguments)
    if name == "now":
        assert values == {}
    else:
        assert name == "get_weather" and {"city", "unit"} <= values.keys() <= {"city", "unit", "days"}
        assert len(values["city"]) <= 20 and values["unit"] in ("C", "F") and values.get("days", 1) in range(1, 8)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def test_forced_calls_follow_their_schemas(client: openai.OpenAI) -> None:
    for seed in range(4):
        options: Any = {"model": MODEL, "messages": ASK, "tools": TOOLS, "seed": seed, "max_tokens": 100}
        options |= {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.0}
        choice = client.chat.completions.create(**options).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        calls: Any = choice.message.tool_calls
        assert len(calls) == 1
        check_call(calls[0].function.name, calls[0].function.arguments)
        pieces: list[Any] = []
        for chunk in client.chat.completions.create(stream=True, **options):
            pieces += chunk.choices[0].delta.tool_calls or []
        assert (pieces[0].function.name, pieces[0].index) == (calls[0].function.name, 0)
        assert "".join(piece.function.arguments for piece in pieces) == calls[0].function.arguments


def test_a_named_function_is_called(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS, tool_choice=named, temperature=1.0, seed=1, max_tokens=100
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"
    check_call(call.function.name, call.function.arguments)


def test_an_answer_parses_as_its_class(client: openai.OpenAI) -> None:
    ask: Any = [{"role": "user", "content": "Describe Paris as JSON with name and is_capital."}]
    answer = client.chat.completions.parse(
        model=MODEL, messages=ask, response_format=City, temperature=0, max_tokens=60
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def test_the_final_message_is_continued(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is"},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=1,
        extra_body={"continue_final_message": True, "echo": True},
    )  # fmt: skip
    assert answer.choices[0].message.content == "The capital of France is Paris"
