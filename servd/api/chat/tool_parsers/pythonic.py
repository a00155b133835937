"""Llama 4's and 3.2's format: an answer that is a Python list of calls, [name(key="value", other=3), …].

Python's literals are rewritten as JSON token by token: nothing is evaluated. Source: Meta's prompt formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence

from servd.api.chat.call import Tool
from servd.api.chat.lark import NO_ARGUMENTS, json_term, literal
from servd.api.chat.reading import Found, Source, Steps, Writer, text_until
from servd.api.chat.tool_parsers import TOOL_PARSERS, CallGrammar, ToolParser

START, END = "<|python_start|>", "<|python_end|>"
MAX_FREE_ORDERS = 16  # optional parameters of a tool without required ones, in a grammar

_NAME = re.compile(r"[\w.:/-]+")
_KEY = re.compile(r"[^=,()\[\]{}'\"\n]+")  # JSON's keys, too, which need be no Python names
_SCALAR = re.compile(r"[\w.+-]+", re.ASCII)
_IN_STRING = re.compile(r"[^\\'\"]+")
_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "/": "/",
            "\\": "\\", "'": "'", '"': '"', "\n": ""}  # fmt: skip
_CODE_LENGTHS = {"x": 2, "u": 4, "U": 8}


@TOOL_PARSERS.register("pythonic")
class Pythonic(ToolParser):
    """See the module. Only the names of tools are calls: an answer may be another list."""

    markers = (START, END)

    @staticmethod
    def is_written_by(template: str) -> bool:
        return START in template or "[func_name1(" in template

    def read(self, source: Source, writer: Writer, tools: Sequence[Tool]) -> Steps:
        names = {tool.name for tool in tools}
        source.hold()
        yield from source.spaces()
        if (yield from source.literal(START)):
            yield from source.spaces()
        yield from _calls(source, writer, names)
        while (yield from text_until(source, writer, [START])):
            source.hold(START)
            yield from source.spaces()
            yield from _calls(source, writer, names)

    def grammar(self, tools: Sequence[Tool], marker: Callable[[str], str]) -> CallGrammar:
        rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            rules += _call_rules(f"call_{i}", tool)
        return CallGrammar(
            "\n".join(rules), first=f"{literal('[')} call", following=f"{literal(', ')} call", end=literal("]"),
            opens="[",
        )  # fmt: skip


def _calls(source: Source, writer: Writer, names: set[str]) -> Steps:
    """A list of calls. What is none, from `source.hold` on, is text."""
    if (yield from source.literal("[")):
        while (yield from _call(source, writer, names)):
            source.hold()
            yield from source.spaces()
            if (yield from source.literal("]")):
                yield from source.spaces()
                yield from source.closing(END)
                source.release()
                return
            if not (yield from source.literal(",")):
                break
    writer.text(source.release())


def _call(source: Source, writer: Writer, names: set[str]) -> Found:
    """One call, certain once its first key, or its end, is there."""
    yield from source.spaces()
    name = yield from source.word(_NAME)
    if name not in names or not (yield from source.literal("(")):
        return False
    yield from source.spaces()
    separator = "{"
    while not (yield from source.literal(")")):
        key = (yield from source.word(_KEY)).rstrip()
        if not key or not (yield from source.literal("=")):
            return separator != "{"
        if separator == "{":
            source.release()
            writer.begin_call(name)
        writer.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        separator = ", "
        yield from source.spaces()
        if not (yield from _value(source, writer.arguments)):
            return True
        yield from source.spaces()
        if (yield from source.literal(",")):
            yield from source.spaces()
        elif (yield from source.peek()) != ")":
            return True
    if separator == "{":
        source.release()
        writer.begin_call(name)
        writer.arguments("{")
    writer.arguments("}")
    return True


def _value(source: Source, emit: Callable[[str], object]) -> Found:
    """Pass a Python literal on as JSON. False: it is none, from where the source now stands."""
    closers: list[str] = []
    while char := (yield from source.peek()):
        if char in "'\"":
            if not (yield from _string(source, emit)):
                return False
        elif char in "[({":
            closers.append({"[": "]", "(": ")", "{": "}"}[char])
            source.take(1)
            emit("{" if char == "{" else "[")
        elif closers and char == closers[-1]:
            source.take(1)
            emit("}" if closers.pop() == "}" else "]")
        elif closers and char in ",:":
            source.take(1)
            yield from source.spaces()
            if char == ":":
                emit(": ")
            elif (yield from source.peek()) != closers[-1]:  # Python allows a comma after the last item
                emit(", ")
        elif closers and char.isspace():
            yield from source.spaces()
        elif word := (yield from source.word(_SCALAR)):
            emit(_WORDS.get(word, word))
        else:
            return False
        if not closers:
            return True
    return False


def _string(source: Source, emit: Callable[[str], object]) -> Found:
    """Pass a string on. False: the answer ended in it, or an escape is none."""
    quote = source.take(1)
    emit('"')
    while char := (yield from source.peek()):
        if char == quote:
            source.take(1)
            emit('"')
            return True
        if char == "\\":
            text = yield from _escape(source)
        else:
            text = source.run(_IN_STRING) or source.take(1)
        emit(json.dumps(text, ensure_ascii=False)[1:-1])
    return False


def _escape(source: Source) -> Generator[None, None, str]:
    """What a backslash and its letters stand for; themselves if nothing."""
    kind = (yield from source.peek(2))[1:]
    count = _CODE_LENGTHS.get(kind, 0)
    written = source.take(len((yield from source.peek(2 + count))))
    if kind in _ESCAPES:
        return _ESCAPES[kind]
    code = written[2:]
    if count and len(code) == count and all(c in "0123456789abcdefABCDEF" for c in code):
        value = int(code, 16)
        if value <= 0x10FFFF and not 0xD800 <= value <= 0xDFFF:
            return chr(value)
    return written


def _call_rules(name: str, tool: Tool) -> list[str]:
    schema = tool.parameters or NO_ARGUMENTS
    properties = schema.get("properties")
    required = schema.get("required")
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules: list[str] = []
    musts: list[str] = []
    mays: list[str] = []
    for i, (key, rule) in enumerate(properties.items() if isinstance(properties, dict) else ()):
        value = f"{name}_{i}"
        json_rule = {**definitions, **rule} if isinstance(rule, dict) else {}
        rules.append(f"{value}: {literal(key + '=')} {value}_json")
        rules.append(f"{value}_json: {json_term(json_rule, is_strict=tool.strict)}")
        (musts if isinstance(required, (list, tuple)) and key in required else mays).append(value)
    comma = literal(", ")
    then = [f"({comma} {value})?" for value in mays]
    if musts:
        body = " ".join([f" {comma} ".join(musts), *then])
    else:  # any of them may be the first
        starts = [" ".join([value, *then[i + 1 :]]) for i, value in enumerate(mays[:MAX_FREE_ORDERS])]
        body = f"({' | '.join(starts)})?" if starts else ""
    return [f"{name}: {literal(tool.name + '(')} {body} {literal(')')}", *rules]
