"""Llama 3's format: an answer that is {"name": …, "parameters": {…}}, or several of them between semicolons.

<|python_tag|> may stand before it, and may follow text. Source: Meta's prompt format of Llama 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from servd.api.chat.call import Tool
from servd.api.chat.json_calls import read_call
from servd.api.chat.lark import json_call_rules, literal
from servd.api.chat.reading import Found, Source, Steps, Writer, text_until
from servd.api.chat.tool_parsers import TOOL_PARSERS, CallGrammar, ToolParser

PYTHON_TAG = "<|python_tag|>"


@TOOL_PARSERS.register("llama3_json")
class Llama3Json(ToolParser):
    """See the module. Only the names of tools are calls: an answer may be another JSON object."""

    markers = (PYTHON_TAG,)

    @staticmethod
    def is_written_by(template: str) -> bool:
        if "<function=" in template or "<|eot_id|>" not in template:
            return False
        return PYTHON_TAG in template or '"parameters": dictionary' in template

    def read(self, source: Source, writer: Writer, tools: Sequence[Tool]) -> Steps:
        names = {tool.name for tool in tools}
        source.hold()
        yield from source.spaces()
        if (yield from source.literal(PYTHON_TAG)):
            yield from source.spaces()
        yield from self._calls(source, writer, names)
        while (yield from text_until(source, writer, [PYTHON_TAG])):
            source.hold(PYTHON_TAG)
            yield from source.spaces()
            yield from self._calls(source, writer, names)

    def _calls(self, source: Source, writer: Writer, names: set[str]) -> Steps:
        """Calls and what separates them. What is none, from `source.hold` on, is text."""
        while (yield from read_call(source, writer, names.__contains__)):
            source.hold()
            if not (yield from _separator(source)):
                break
        writer.text(source.release())

    def grammar(self, tools: Sequence[Tool], marker: Callable[[str], str]) -> CallGrammar:
        return CallGrammar(
            rules=json_call_rules(tools, "parameters"), first="call", following=f"{literal('; ')} call", opens="{"
        )


def _separator(source: Source) -> Found:
    yield from source.spaces()
    found = (yield from source.peek()) in (";", ",")
    if found:
        source.take(1)
        yield from source.spaces()
    return found or (yield from source.peek()) == "{"
