"""Tool call parsers: what models write, how clients see it, whatever the pieces it comes in."""

from __future__ import annotations

import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servd.api.chat.parts import TextPart, ToolCallPart
from servd.api.chat.tool_parsers import TOOL_PARSERS, ToolParser
from tests.unit.api.chat.reading_helpers import TOOLS, Seen, seen, tool_reader

NAMES = TOOL_PARSERS.discover()
PARIS = '{"city": "Paris"}'
QWEN_CALL = """<tool_call>
<function=get_weather>
<parameter=city>
Paris
</parameter>
<parameter=days>
3
</parameter>
</function>
</tool_call>"""

# (parser, marks of its template, the model's words, what is seen)
EXAMPLES: list[tuple[str, str, str, Seen]] = [
    ("hermes", "", "Hello <b>you</b>.\n", ("Hello <b>you</b>.\n", None, [])),
    (
        "hermes", "",
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        ("I look.", None, [("get_weather", PARIS), ("now", "{}")]),
    ),
    (
        "hermes", "",  # order, white space, other keys, tags and brackets in strings
        '<tool_call>{ "id":1, "arguments" : {"city":"}</tool_call>\\"{"},"name":"get_weather"}</tool_call>done',
        ("done", None, [("get_weather", '{"city":"}</tool_call>\\"{"}')]),
    ),
    ("hermes", "", '<tool_call>{"name": "now"}</tool_call>', ("", None, [("now", "{}")])),
    ("hermes", "", '<tool_call>{"name": "now", "arguments": null}', ("", None, [("now", "{}")])),
    (
        "hermes", "", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        ("", None, [("get_weather", PARIS)]),
    ),
    (
        "hermes", "", 'a <tool_call>{"name": get}</tool_call> b <tool_call>{"name": "now"}</tool_call>',
        ('a <tool_call>{"name": get}</tool_call> b', None, [("now", "{}")]),
    ),
    ("hermes", "", 'cut <tool_call>\n{"name": "now', ('cut <tool_call>\n{"name": "now', None, [])),
    (
        "hermes", "", '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa',
        ("", None, [("get_weather", '{"city": "Pa')]),
    ),
    (
        "llama3_json", "",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}',
        ("", None, [("get_weather", PARIS), ("now", "{}")]),
    ),
    ("llama3_json", "", 'So:<|python_tag|>{"name": "now", "arguments": {}}', ("So:", None, [("now", "{}")])),
    ("llama3_json", "", '{"name": "Ann", "age": 3}', ('{"name": "Ann", "age": 3}', None, [])),
    ("llama3_json", "", "It is {late}.", ("It is {late}.", None, [])),
    (
        "mistral", "",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
        ("", None, [("get_weather", PARIS), ("now", "{}")]),
    ),
    (
        "mistral", "[ARGS]", 'Hm.[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}[TOOL_CALLS]now{}',
        ("Hm.", None, [("get_weather", PARIS), ("now", "{}")]),
    ),
    ("mistral", "", "[TOOL_CALLS] none [1]", ("[TOOL_CALLS] none [1]", None, [])),
    (
        "qwen3_coder", "", f"I look.\n\n{QWEN_CALL}\n<tool_call>\n<function=now>\n</function>\n</tool_call>\n",
        ("I look.", None, [("get_weather", '{"city": "Paris", "days": 3}'), ("now", "{}")]),
    ),
    (
        "qwen3_coder", "",  # text stays text, whatever it looks like; values of other kinds are JSON
        '<function=get_weather><parameter=city>\n3\n"a" < \\b\n\n</parameter><parameter=where>{"lat": 1.5}</parameter>'
        "<parameter=tags>none of them</parameter><parameter=live>True</parameter></function>",
        (
            "", None,
            [(
                "get_weather",
                '{"city": "3\\n\\"a\\" < \\\\b\\n", "where": {"lat": 1.5}, "tags": "none of them", "live": true}',
            )],
        ),
    ),
    ("qwen3_coder", "", "<function=> <tool_call> x", ("<function=> <tool_call> x", None, [])),
    (
        "pythonic", "", "[get_weather(city='Paris'), now()]", ("", None, [("get_weather", PARIS), ("now", "{}")]),
    ),
    (
        "pythonic", "",
        '<|python_start|>[get_weather(city="it\'s \\"x\\"\\n\\u00e9", days=-3, where={\'lat\': 1.5,}, '
        "tags=['a', (1,)], live=None)]<|python_end|>",
        (
            "", None,
            [(
                "get_weather",
                '{"city": "it\'s \\"x\\"\\né", "days": -3, "where": {"lat": 1.5}, "tags": ["a", [1]], "live": null}',
            )],
        ),
    ),
    ("pythonic", "", '[get_weather(a-b = 1, c=2)]', ("", None, [("get_weather", '{"a-b": 1, "c": 2}')])),
    ("pythonic", "", "[1, 2] and [now(3)]", ("[1, 2] and [now(3)]", None, [])),
    ("pythonic", "", "[now(3)]", ("[now(3)]", None, [])),
    ("pythonic", "", "[other(x=3)]", ("[other(x=3)]", None, [])),
]  # fmt: skip

# Pieces of which any answer may be made: all formats' markers, brackets, quotes, and words.
PIECES = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<function=get_weather>",
    "</function>", "<parameter=city>", "<parameter=days>", "</parameter>", "<|python_start|>", "<|python_end|>",
    '{"name": "now", "arguments": ', '{"name": "get_weather", "parameters": {"city": ', "[get_weather(city=", "now",
    "{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ":", ";", "=", "<", ">", " ", "\n", "x", "é😀", "12",
    "null", "\\u00",
]  # fmt: skip


@pytest.mark.parametrize(("name", "template", "text", "expected"), EXAMPLES)
def test_examples(name: str, template: str, text: str, expected: Seen) -> None:
    assert seen(tool_reader(name, template), text) == expected
    for _, arguments in expected[2]:
        if text.endswith(("}", ">", "]", "]\n", ">\n")):
            assert isinstance(json.loads(arguments), dict)
    assert seen(tool_reader(name, template), text, range(1, len(text))) == expected


# (parser, a call up to the end of its arguments, what closes it)
CLOSED_CALLS = [
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}', "\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>",
     "\n</function>\n</tool_call>"),
    ("pythonic", "<|python_start|>[get_weather(city='Paris')", "]<|python_end|>"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "call", "end"), CLOSED_CALLS)
def test_a_closing_tag_that_breaks_off_is_no_text(name: str, call: str, end: str) -> None:
    for length in range(len(end) + 1):
        text = call + end[:length]
        expected = ("", None, [("get_weather", PARIS)])
        assert seen(tool_reader(name, ""), text) == expected, text
        assert seen(tool_reader(name, ""), text, range(1, len(text))) == expected, text


@pytest.mark.parametrize(("name", "call", "end"), CLOSED_CALLS[:2])
def test_what_only_begins_like_a_closing_tag_is_text(name: str, call: str, end: str) -> None:
    text = f"{call}{end[:5]}> done"
    assert seen(tool_reader(name, ""), text)[0] == f"{end[:5]}> done"


@pytest.mark.parametrize("name", NAMES)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30), seed=st.integers(0, 2**32))
def test_cuts_do_not_matter(name: str, pieces: list[str], seed: int) -> None:
    text = "".join(pieces)
    draw = random.Random(seed)
    cuts = [draw.randint(0, len(text)) for _ in range(draw.randint(0, 12))]
    template = draw.choice(["", "[ARGS]"])
    hidden = [] if draw.random() < 0.5 else TOOL_PARSERS.get(name).markers
    whole = seen(tool_reader(name, template, hidden), text)
    assert seen(tool_reader(name, template, hidden), text, cuts) == whole
    if not whole[2] and not hidden:
        assert whole[0] == text


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(alphabet='<[{(abtool_c>}])"\\ \n', max_size=60), cut=st.integers(0, 60))
def test_other_text_is_untouched(name: str, text: str, cut: int) -> None:
    assert seen(tool_reader(name), text, [min(cut, len(text))]) == (text, None, [])


@pytest.mark.parametrize("name", NAMES)
def test_arguments_come_as_they_grow(name: str) -> None:
    [(template, text)] = [e[1:3] for e in EXAMPLES if e[0] == name and len(e[3][2]) == 2][:1]
    reader, city = tool_reader(name, template), text.index("Paris")
    first = [part for part in reader.push(text[: city + 3]) if isinstance(part, ToolCallPart)]
    assert [(part.index, part.name) for part in first[:1]] == [(0, "get_weather")]
    assert "".join(part.arguments for part in first) == '{"city": "Par'
    rest = reader.push(text[city + 3 : city + 5])
    assert rest == [ToolCallPart(0, "is")]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_answers_take_linear_time(name: str) -> None:
    texts = [
        '{"name": "now", "arguments": ' + '{"a": [' * 15_000,
        "[" * 100_000,
        " " * 100_000,
        "<" * 100_000,
        "<tool_call>" * 9_000,
        '<tool_call>{"' * 8_000,
        "[TOOL_CALLS][" * 8_000,
        "<function=get_weather><parameter=days>" + "[" * 100_000 + "</parameter>",
        "[get_weather(tags=" + "[" * 100_000,
        "[get_weather(city='" + "\\" * 100_000,
        '<tool_call>{"name": "' + "\n" * 100_000,
        '<tool_call>{"arguments": "' + "\\u0041" * 16_000,
        "<|python_tag|>" * 7_000,
    ]
    began = time.monotonic()
    for text in texts:
        seen(tool_reader(name), text)
        text = text[:20_000]
        seen(tool_reader(name, "", TOOL_PARSERS.get(name).markers), text, range(1, len(text)))
    assert time.monotonic() - began < 60, "a bound on hangs: quadratic work would take minutes"


@pytest.mark.parametrize("name", NAMES)
def test_every_parser_has_its_own_markers_and_ids(name: str) -> None:
    parser = TOOL_PARSERS.get(name)("")
    assert isinstance(parser, ToolParser)
    assert not any(a != b and a in b for a in parser.markers for b in parser.markers)
    assert len({parser.new_id() for _ in range(100)}) == 100
    grammar = parser.grammar(TOOLS, lambda text: json.dumps(text))
    assert grammar.marker is not None or grammar.opens


def test_mistral_ids_are_what_its_templates_allow() -> None:
    call_id = TOOL_PARSERS.get("mistral")("").new_id()
    assert len(call_id) == 9 and call_id.isalnum()


def test_templates_tell_the_format() -> None:
    templates = {
        "hermes": "{%- if tools %}<tools>…</tools> <tool_call>\n{\"name\": <function-name>, \"arguments\": <args>}",
        "llama3_json": "{{- '<|python_tag|>' }} <|eot_id|>",
        "mistral": "{{ '[AVAILABLE_TOOLS]' }} {{ '[TOOL_CALLS] [' }}",
        "qwen3_coder": "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>",
        "pythonic": "You SHOULD put it in the format of [func_name1(params_name1=params_value1)]",
    }  # fmt: skip
    assert sorted(templates) == NAMES
    for expected, template in templates.items():
        assert [name for name in NAMES if TOOL_PARSERS.get(name).is_written_by(template)] == [expected]
    others = (
        "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key> arguments",  # GLM
        '<tool_calls>[{"name": "f", "arguments": {}}]</tool_calls> <tool_call>',
        "<seed:tool_call>\n<function=f>\n<parameter=p>",
        "<|python_tag|> <|eot_id|> <function=f>{}</function>",
        "{{ messages[0].content }}",
    )
    for template in others:
        assert not [name for name in NAMES if TOOL_PARSERS.get(name).is_written_by(template)], template


def test_special_tokens_never_show() -> None:
    hidden = ["[TOOL_CALLS]", "[ARGS]"]
    text = "a [TOOL_CALLS] b [ARGS] c [ARG"
    for cuts in ([], range(1, len(text))):
        assert seen(tool_reader("mistral", "", hidden), text, cuts) == ("a  b  c [ARG", None, [])


def test_text_comes_at_once() -> None:
    reader = tool_reader("hermes")
    assert reader.push("Hello") == [TextPart("Hello")]
    assert reader.push(" <") == []
    assert reader.push("b>") == [TextPart(" <b>")]
