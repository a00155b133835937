"""Hermes' and Qwen's format: text, then <tool_call>{"name": …, "arguments": {…}}</tool_call>, once or more.

Also what servd asks of models whose template knows no tools.
Source: Hermes-Function-Calling's README, Qwen3's template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from servd.api.chat.call import Tool
from servd.api.chat.json_calls import read_tagged_call
from servd.api.chat.lark import json_call_rules, literal
from servd.api.chat.reading import Source, Steps, Writer, text_until
from servd.api.chat.tool_parsers import TOOL_PARSERS, CallGrammar, ToolParser

OPENING, CLOSING = "<tool_call>", "</tool_call>"
OTHERS = ("<function=", "<arg_key>", "<tool_calls>")


@TOOL_PARSERS.register("hermes")
class Hermes(ToolParser):
    """See the module."""

    markers = (OPENING, CLOSING)

    @staticmethod
    def is_written_by(template: str) -> bool:
        # Others write names, keys, lists or XML between the same tags.
        is_json = any(key in template for key in ('"arguments"', '\\"arguments\\"'))
        return OPENING in template and is_json and not any(tag in template for tag in OTHERS)

    def read(self, source: Source, writer: Writer, tools: Sequence[Tool]) -> Steps:
        while (yield from text_until(source, writer, [OPENING])):
            if (yield from read_tagged_call(source, writer, OPENING)):
                blanks = yield from source.spaces()
                if not (yield from source.closing(CLOSING)):
                    writer.text(blanks)

    def grammar(self, tools: Sequence[Tool], marker: Callable[[str], str]) -> CallGrammar:
        newline = literal("\n")
        call = f"{newline} call {newline} {marker(CLOSING)}"
        return CallGrammar(
            rules=json_call_rules(tools, "arguments"),
            first=call,
            following=f"{newline} {marker(OPENING)} {call}",
            marker=OPENING,
        )
