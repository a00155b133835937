"""Qwen3-Coder's format: <tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>.

Values are plain text; what they mean in JSON follows from the tool's schema. Source: Qwen3-Coder's chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from servd.api.chat.call import Tool
from servd.api.chat.lark import json_term, literal
from servd.api.chat.reading import Found, Source, Steps, Writer, begun_length, text_until
from servd.api.chat.tool_parsers import TOOL_PARSERS, CallGrammar, ToolParser

OPENING, CLOSING = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"

_NAME = re.compile(r"[^<>\n]+")
_SAYS_TYPE = {"type", "anyOf", "oneOf", "allOf", "$ref", "enum", "const"}
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}


@TOOL_PARSERS.register("qwen3_coder")
class Qwen3Coder(ToolParser):
    """See the module. The bounds of a strict tool's plain strings (pattern, length) are not enforced."""

    markers = (OPENING, CLOSING)

    @staticmethod
    def is_written_by(template: str) -> bool:
        return OPENING in template and FUNCTION in template and PARAMETER in template

    def read(self, source: Source, writer: Writer, tools: Sequence[Tool]) -> Steps:
        schemas = {tool.name: tool.parameters or {} for tool in tools}
        while marker := (yield from text_until(source, writer, [OPENING, FUNCTION])):
            source.hold(marker)
            if marker == OPENING:
                yield from source.spaces()
            if not (marker == FUNCTION or (yield from source.literal(FUNCTION))):
                writer.text(source.release())
                continue
            name = yield from _name(source)
            if name is None:
                writer.text(source.release())
                continue
            source.release()
            writer.begin_call(name)
            yield from _parameters(source, writer, schemas.get(name, {}))

    def grammar(self, tools: Sequence[Tool], marker: Callable[[str], str]) -> CallGrammar:
        rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            rules += _call_rules(f"call_{i}", tool)
        newline = literal("\n")
        call = f"{newline} call {marker(CLOSING)}"
        return CallGrammar(
            "\n".join(rules), first=call, following=f"{newline} {marker(OPENING)} {call}", marker=OPENING
        )


def _name(source: Source) -> Generator[None, None, str | None]:
    """What stands up to the next >."""
    name = yield from source.word(_NAME)
    return name if (yield from source.literal(">")) and name else None


def _parameters(source: Source, writer: Writer, schema: Mapping[str, Any]) -> Steps:
    """The parameters of a call as a JSON object."""
    properties = schema.get("properties")
    separator = "{"
    while True:
        blanks = yield from source.spaces()
        if not (yield from source.literal(PARAMETER)):
            break
        key = yield from _name(source)
        if key is None:
            break
        writer.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        separator = ", "
        rule = properties.get(key) if isinstance(properties, Mapping) else None
        yield from (_text_value if _is_text(rule) else _typed_value)(source, writer)
    writer.arguments("{}" if separator == "{" else "}")
    if (yield from source.closing(END_FUNCTION)):
        blanks = yield from source.spaces()
        if (yield from source.closing(CLOSING)):
            blanks = ""
    writer.text(blanks)


def _is_text(rule: object) -> bool:
    """Whether the schema takes strings alone, or says nothing."""
    if not isinstance(rule, Mapping):
        return True
    return rule.get("type") == "string" or not rule.keys() & _SAYS_TYPE


def _text_value(source: Source, writer: Writer) -> Steps:
    writer.arguments('"')
    yield from _value(source, lambda text: writer.arguments(json.dumps(text, ensure_ascii=False)[1:-1]))
    writer.arguments('"')


def _typed_value(source: Source, writer: Writer) -> Steps:
    pieces: list[str] = []
    yield from _value(source, pieces.append)
    writer.arguments(_as_json("".join(pieces)))


def _as_json(text: str) -> str:
    """The text itself if it is JSON, or a word for true, false or null; else as a JSON string."""
    word = _WORDS.get(text.strip().lower())
    if word is not None:
        return word
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _value(source: Source, emit: Callable[[str], object]) -> Found:
    """Pass a value on, without the newline at either end. False: the answer ended in it."""
    if (yield from source.peek()) == "\n":
        source.take(1)
    while True:
        waiting = source.waiting()
        at = waiting.find(END_PARAMETER)
        if at >= 0:
            emit(source.take(at).removesuffix("\n"))
            source.take(len(END_PARAMETER))
            return True
        keep = begun_length(waiting, "\n" + END_PARAMETER) or begun_length(waiting, END_PARAMETER)
        emit(source.take(len(waiting) - keep))
        if len((yield from source.peek(keep + 1))) <= keep:
            emit(source.take(keep))
            return False


def _call_rules(name: str, tool: Tool) -> list[str]:
    schema = tool.parameters or {}
    properties = schema.get("properties")
    required = schema.get("required")
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules, body = [], []
    for i, (key, rule) in enumerate(properties.items() if isinstance(properties, Mapping) else ()):
        value, term = f"{name}_{i}", literal(f"{PARAMETER}{key}>\n")
        if _is_text(rule):
            values = rule.get("enum") if isinstance(rule, Mapping) else None
            choices = [each for each in values if isinstance(each, str)] if isinstance(values, (list, tuple)) else []
            if choices:
                rules.append(f"{value}: ({' | '.join(map(literal, choices))}) {literal(chr(10) + END_PARAMETER)}")
            else:
                rules.append(f"{value}[lazy]: /(?s:.*)\\n<\\/parameter>/")
        else:
            json_rule = json_term({**definitions, **rule}, is_strict=tool.strict)
            rules += [f"{value}: {value}_json {literal(chr(10) + END_PARAMETER)}", f"{value}_json: {json_rule}"]
        count = "" if isinstance(required, (list, tuple)) and key in required else "?"
        body.append(f"({term} {value} {literal(chr(10))}){count}")
    head, tail = literal(f"{FUNCTION}{tool.name}>\n"), literal(f"{END_FUNCTION}\n")
    return [f"{name}: {head} {' '.join(body)} {tail}", *rules]
