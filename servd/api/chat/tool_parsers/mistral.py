"""Mistral's format: [TOOL_CALLS] and a JSON array of calls; newer: [TOOL_CALLS]name[ARGS]{…} for each call.

Source: mistral-common's tokenizers v3 to v13.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Sequence

from servd.api.chat.call import Tool
from servd.api.chat.json_calls import read_call, read_value
from servd.api.chat.lark import arguments_term, json_call_rules, literal
from servd.api.chat.reading import Found, Source, Steps, Writer, text_until
from servd.api.chat.tool_parsers import TOOL_PARSERS, CallGrammar, ToolParser

CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

_ID_LETTERS = string.ascii_letters + string.digits
_NAME = re.compile(r"[\w.:/-]+")
_WORD = re.compile(r"\w+")


@TOOL_PARSERS.register("mistral")
class Mistral(ToolParser):
    """See the module. Ids have nine letters and digits: the templates refuse others."""

    markers = (CALLS, CALL_ID, ARGS)

    @staticmethod
    def is_written_by(template: str) -> bool:
        return CALLS in template

    def new_id(self) -> str:
        return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))

    def read(self, source: Source, writer: Writer, tools: Sequence[Tool]) -> Steps:
        while (yield from text_until(source, writer, [CALLS])):
            source.hold(CALLS)
            yield from source.spaces()
            kind = yield from source.peek()
            if kind == "[":
                yield from _array(source, writer)
            elif not (yield from (read_call(source, writer, bool) if kind == "{" else _named_call(source, writer))):
                writer.text(source.release())

    def grammar(self, tools: Sequence[Tool], marker: Callable[[str], str]) -> CallGrammar:
        if ARGS not in self.template:
            return CallGrammar(
                rules=json_call_rules(tools, "arguments"), first=f"{literal('[')} call",
                following=f"{literal(', ')} call", end=literal("]"), marker=CALLS,
            )  # fmt: skip
        calls = [f"{literal(tool.name)} {marker(ARGS)} {arguments_term(tool)}" for tool in tools]
        rules = [f"call_{i}: {call}" for i, call in enumerate(calls)]
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(calls))))
        return CallGrammar("\n".join(rules), first="call", following=f"{marker(CALLS)} call", marker=CALLS)


def _array(source: Source, writer: Writer) -> Steps:
    source.take(1)
    while True:
        yield from source.spaces()
        if not (yield from read_call(source, writer, bool)):
            break
        source.hold()
        yield from source.spaces()
        if (yield from source.literal("]")):
            source.release()
            return
        if not (yield from source.literal(",")):
            break
    writer.text(source.release())


def _named_call(source: Source, writer: Writer) -> Found:
    name = yield from source.word(_NAME)
    if (yield from source.literal(CALL_ID)):
        yield from source.word(_WORD)
    yield from source.literal(ARGS)
    yield from source.spaces()
    if not name or (yield from source.peek()) != "{":
        return False
    source.release()
    writer.begin_call(name)
    yield from read_value(source, writer.arguments)
    return True
