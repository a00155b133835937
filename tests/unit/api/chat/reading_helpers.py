"""How the tests of this folder read an answer: whole, or in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from servd.api.chat.call import Tool
from servd.api.chat.parts import AnswerReader, Message
from servd.api.chat.reading import StepReader
from servd.api.chat.reasoning_parsers import REASONING_PARSERS
from servd.api.chat.tool_parsers import TOOL_PARSERS

WEATHER = Tool(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "where": {"type": "object", "properties": {"lat": {"type": "number"}}},
            "tags": {"type": "array", "items": {"type": "string"}},
            "live": {"type": ["boolean", "null"]},
        },
        "required": ["city"],
    },
)
NOW = Tool("now")
TOOLS = (WEATHER, NOW)

Seen = tuple[str, str | None, list[tuple[str, str]]]  # text, reasoning, calls


def tool_reader(name: str, template: str = "", hidden: Sequence[str] = (), tools: Sequence[Tool] = TOOLS) -> StepReader:
    parser = TOOL_PARSERS.get(name)(template)
    return StepReader(lambda source, writer: parser.read(source, writer, tools), parser.new_id, hidden)


def reasoning_reader(name: str, *, is_inside: bool = False) -> StepReader:
    parser = REASONING_PARSERS.get(name)
    return StepReader(lambda source, writer: parser.read(source, writer, is_inside=is_inside), lambda: "no id")


def seen(reader: AnswerReader, text: str, cuts: Sequence[int] = ()) -> Seen:
    """What a client makes of the parts of `text`, pushed in the pieces between `cuts`."""
    message = Message()
    for start, end in pairwise([0, *sorted(cuts), len(text)]):
        message.add(reader.push(text[start:end]))
    message.add(reader.finish())
    return message.text, message.reasoning, [(call.name, call.arguments) for call in message.tool_calls]
