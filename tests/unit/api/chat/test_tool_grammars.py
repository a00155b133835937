"""Grammars that force tool calls: what they let through is what the parsers read, compiled by llguidance itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from servd.api.chat.call import AnswerFormat, ChatCall, Tool, ToolChoice
from servd.api.chat.formats import ChatFormats, ParserChoice
from servd.api.chat.tool_parsers import TOOL_PARSERS
from servd.api.chat.tools import answer_guidance
from servd.engine.tokenizer import Tokenizer
from servd.errors import UnsupportedError
from servd.hub import ModelFiles
from servd.sampling_params import SamplingParams
from tests.unit.api.chat.reading_helpers import TOOLS, WEATHER, seen, tool_reader

NAMES = TOOL_PARSERS.discover()
STRICT = (replace(WEATHER, strict=True), replace(TOOLS[1], strict=True))
FORMAT = AnswerFormat("json_schema", {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})

ONE = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
    "llama3_json": '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
    "pythonic": '[get_weather(city="Paris", days=3)]',
}
TWO = {
    "hermes": ONE["hermes"] + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama3_json": ONE["llama3_json"] + '; {"name": "now", "parameters": {}}',
    "mistral": ONE["mistral"][:-1] + ', {"name": "now", "arguments": {}}]',
    "qwen3_coder": ONE["qwen3_coder"] + "\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "pythonic": '[get_weather(city="Paris", days=3), now()]',
}


CALLS_OF_NOW = {  # one, and what another adds
    name: (one, separator + one[start:])
    for name, one, separator, start in (
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "\n", 0),
        ("llama3_json", '{"name": "now", "parameters": {}}', "; ", 0),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}', ", ", 13),
        ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "\n", 0),
        ("pythonic", "[now()", ", ", 1),
    )
}


@dataclass
class Facts:
    """A tokenizer's part in this: here, markers that are special tokens."""

    ids: dict[str, int]
    template_source: str = ""
    template_variables: frozenset[str] = frozenset(("tools",))

    @property
    def special_token_ids(self) -> frozenset[int]:
        return frozenset(self.ids.values())

    def token_id(self, text: str) -> int | None:
        return self.ids.get(text)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return str(messages)


@pytest.fixture(scope="module")
def tokens(starter_files: ModelFiles) -> tuple[Tokenizer, LLTokenizer]:
    tokenizer = Tokenizer.from_files(starter_files)
    path = str(starter_files.folder / "tokenizer.json")
    return tokenizer, LLTokenizer(path, n_vocab=tokenizer.vocab_size, eos_token=sorted(tokenizer.eos_token_ids))


class Grammar:
    """What a model may write, decided by llguidance."""

    def __init__(
        self, tokens: tuple[Tokenizer, LLTokenizer], formats: ChatFormats, prompt_end: str, **call: Any
    ) -> None:
        self.tokenizer, self._ll_tokenizer = tokens
        self.formats = formats
        found = answer_guidance(ChatCall([], SamplingParams(), **call), formats, prompt_end)
        assert found is not None
        self.text, self.param = found

    def takes(self, text: str) -> bool:
        """Whether an answer may be `text`, whose special markers are single tokens."""
        pieces = [text]
        for marker in self.formats.special:
            pieces = [part for piece in pieces for part in _with_separators(piece, marker)]
        ids: list[int] = []
        for piece in pieces:
            is_token = piece in self.formats.special
            ids += [self.formats.token_ids[piece]] if is_token else self.tokenizer.encode(piece)
        matcher = LLMatcher(self._ll_tokenizer, self.text, log_level=0)
        assert not matcher.get_error(), matcher.get_error()
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def _with_separators(text: str, separator: str) -> list[str]:
    first, *rest = text.split(separator)
    return [first, *(piece for part in rest for piece in (separator, part))]


def formats_of(name: str, *, special: bool = False, reasoning: str = "none", template: str = "") -> ChatFormats:
    markers = TOOL_PARSERS.get(name).markers if special else ()
    ids = {marker: 3 + i for i, marker in enumerate(markers)}
    return ChatFormats.of(Facts(ids, template), ParserChoice(name, reasoning))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forced_calls(name: str, special: bool, tokens: tuple[Tokenizer, LLTokenizer]) -> None:
    formats = formats_of(name, special=special)
    many = Grammar(tokens, formats, "", tools=TOOLS, tool_choice=ToolChoice("required"))
    single = Grammar(tokens, formats, "", tools=TOOLS, tool_choice=ToolChoice("required", parallel=False))
    named = Grammar(tokens, formats, "", tools=TOOLS, tool_choice=ToolChoice("required", "now"))
    assert many.param == "tool_choice"
    for text in (ONE[name], TWO[name]):
        assert many.takes(text)
        assert not many.takes(text.replace("days", "nights")) and not many.takes(text.replace("get_weather", "got"))
        assert (
            not many.takes(text.replace("3", "three")) and not many.takes(f"Well. {text}") and not many.takes("Well.")
        )
        assert not named.takes(text)
    assert (single.takes(ONE[name]), single.takes(TWO[name])) == (True, False)
    expected = [("get_weather", '{"city": "Paris", "days": 3}'), ("now", "{}")]
    assert seen(tool_reader(name), TWO[name]) == ("", None, expected)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_strict_tools_are_held_to_their_schema_once_a_call_begins(
    name: str, special: bool, tokens: tuple[Tokenizer, LLTokenizer]
) -> None:
    grammar = Grammar(tokens, formats_of(name, special=special), "", tools=STRICT)
    assert grammar.param == "tools"
    for text in ("", "No call here, <b>really</b>: 3 > 2.", ONE[name], TWO[name]):
        assert grammar.takes(text), text
    assert not grammar.takes(TWO[name].replace("days", "nights")) and not grammar.takes(TWO[name].replace("3", "x"))
    if TOOL_PARSERS.get(name)("").grammar(TOOLS, str).marker is not None:
        assert grammar.takes(f"I look.\n{TWO[name]}")
        assert not grammar.takes(f"I look.\n{TWO[name].replace('days', 'nights')}")
    one = Grammar(tokens, formats_of(name, special=special), "", tools=TOOLS, tool_choice=ToolChoice(parallel=False))
    assert (one.takes(ONE[name]), one.takes(TWO[name]), one.takes("None.")) == (True, False, True)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_follows_its_format_or_calls(name: str, tokens: tuple[Tokenizer, LLTokenizer]) -> None:
    formats = formats_of(name)
    if formats.tool_parser is not None and formats.tool_parser.grammar(TOOLS, str).marker is None:
        with pytest.raises(UnsupportedError, match="tool_choice none or required"):
            Grammar(tokens, formats, "", tools=TOOLS, answer_format=FORMAT)
    else:
        grammar = Grammar(tokens, formats, "", tools=TOOLS, answer_format=FORMAT)
        assert grammar.takes('{"n":3}') and grammar.takes(TWO[name]) and not grammar.takes("three")
        assert grammar.param == "response_format"
    forced = Grammar(tokens, formats, "", tools=TOOLS, answer_format=FORMAT, tool_choice=ToolChoice("required"))
    assert forced.takes(ONE[name]) and not forced.takes('{"n":3}')
    free = Grammar(tokens, formats, "", tools=TOOLS, answer_format=FORMAT, tool_choice=ToolChoice("none"))
    assert free.takes('{"n":3}') and not free.takes(ONE[name])


@pytest.mark.parametrize("name", NAMES)
def test_long_descriptions_do_not_count(name: str, tokens: tuple[Tokenizer, LLTokenizer]) -> None:
    city = {"type": "string", "description": "c" * 10_000, "title": "City"}
    described = {"type": "object", "description": "d" * 10_000, "properties": {"city": city, "title": {"type": "null"}}}
    tools = (Tool("go", "walk", described),)
    grammar = Grammar(tokens, formats_of(name), "", tools=tools, tool_choice=ToolChoice("required"))
    assert len(grammar.text) < 1500 and '"title' in grammar.text.replace("\\", "").replace("=title>", '"title')


@pytest.mark.parametrize("name", NAMES)
def test_forced_calls_come_to_an_end(name: str, tokens: tuple[Tokenizer, LLTokenizer]) -> None:
    grammar = Grammar(tokens, formats_of(name), "", tools=TOOLS[1:], tool_choice=ToolChoice("required"))
    one, again = CALLS_OF_NOW[name]
    end = "]" if one[-1] == ")" or name == "mistral" else ""
    assert grammar.takes(one + again * 15 + end) and not grammar.takes(one + again * 16 + end)


def test_calls_by_name_as_newer_mistral_models_write_them(tokens: tuple[Tokenizer, LLTokenizer]) -> None:
    formats = formats_of("mistral", special=True, template="[TOOL_CALLS] [ARGS]")
    grammar = Grammar(tokens, formats, "", tools=TOOLS, tool_choice=ToolChoice("required"))
    text = '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}'
    assert grammar.takes(text) and not grammar.takes(text.replace("city", "town"))


@pytest.mark.parametrize("special", [False, True])
def test_models_that_think_do_so_before(special: bool, tokens: tuple[Tokenizer, LLTokenizer]) -> None:
    ids = {"<think>": 7, "</think>": 8} if special else {}
    formats = ChatFormats.of(Facts(ids), ParserChoice("hermes", "think"))
    grammar = Grammar(tokens, formats, "assistant\n", answer_format=FORMAT)
    assert grammar.takes('{"n":3}') and grammar.takes('<think>\nHm, {"x".\n</think>\n\n{"n":3}')
    assert not grammar.takes("<think>\nHm") and not grammar.takes('Hm</think>{"n":3}')
    inside = Grammar(tokens, formats, "assistant\n<think>\n", answer_format=FORMAT)
    assert inside.takes('Hm</think>{"n":3}') and not inside.takes('{"n":3}') and not inside.takes("Hm</think>\n\nHm")
    over = Grammar(tokens, formats, "<think>\n\n</think>\n\n", answer_format=FORMAT)
    assert over.takes('{"n":3}') and not over.takes('Hm</think>{"n":3}')
    forced = Grammar(tokens, formats, "<think>\n", tools=TOOLS, tool_choice=ToolChoice("required"))
    assert forced.takes(f"Hm\n</think>\n\n{ONE['hermes']}") and not forced.takes("Hm\n</think>\n\nHm")
    strict = Grammar(tokens, formats, "<think>\n", tools=STRICT)
    assert strict.takes(f"Hm\n</think>\n\nSo: {ONE['hermes']}") and strict.takes("Hm\n</think>\n\nNo.")


@pytest.mark.parametrize("name", NAMES)
def test_tools_that_share_definitions_and_need_nothing(name: str, tokens: tuple[Tokenizer, LLTokenizer]) -> None:
    point = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
    parameters = {
        "type": "object",
        "properties": {
            "at": {"$ref": "#/$defs/Point"},
            "unit": {"enum": ["m", "ft"]},
            "très 😀": {"type": "string", "enum": ["a", "b"]},
            "fast": {"type": "boolean"},
        },
        "$defs": {"Point": point},
    }
    tools = (Tool("go", "walk", parameters), Tool("stay"))
    grammar = Grammar(tokens, formats_of(name), "", tools=tools, tool_choice=ToolChoice("required"))
    texts = {
        "hermes": '<tool_call>\n{"name": "go", "arguments": {"unit": "m", "très 😀": "a", "fast": true}}\n</tool_call>',
        "llama3_json": '{"name": "go", "parameters": {"unit": "m", "très 😀": "a", "fast": true}}',
        "mistral": '[TOOL_CALLS][{"name": "go", "arguments": {"unit": "m", "très 😀": "a", "fast": true}}]',
        "qwen3_coder": '<tool_call>\n<function=go>\n<parameter=unit>\n"m"\n</parameter>\n<parameter=très 😀>\na\n'
        "</parameter>\n<parameter=fast>\ntrue\n"
        "</parameter>\n</function>\n</tool_call>",
        "pythonic": '[go(unit="m", très 😀="a", fast=true)]',
    }
    assert grammar.takes(texts[name]) and not grammar.takes(texts[name].replace("true", "1"))
    expected = {"unit": "m", "très 😀": "a", "fast": True}
    _, _, calls = seen(tool_reader(name, tools=tools), texts[name])
    assert [(call, json.loads(arguments)) for call, arguments in calls] == [("go", expected)]
