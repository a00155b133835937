"""Grammars before they are served: what texts mean, what is refused and how, and what hostile ones can do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer

from servd import SamplingParams
from servd.engine import guidance
from servd.engine.guidance import MAX_PENDING, MAX_VERDICTS, GuidanceChecker
from servd.engine.tokenizer import Tokenizer
from servd.errors import InvalidRequestError, OverloadedError, UnsupportedError
from servd.grammar import compile_grammar, load_vocabulary
from tests.fakes import FakeEngine
from tests.unit.engine.test_tokenizer import sentencepiece_backend, write_folder

VOCAB_SIZE, EOS = 257, 256


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token for each byte, and an end-of-text token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="module")
def vocabulary(tokenizer_path: Path) -> LLTokenizer:
    return LLTokenizer(str(tokenizer_path), n_vocab=VOCAB_SIZE, eos_token=[EOS])


@pytest.fixture
def checker(tokenizer_path: Path) -> Iterator[GuidanceChecker]:
    checker = GuidanceChecker(tokenizer_path, VOCAB_SIZE, frozenset((EOS,)))
    yield checker
    checker.close()


def follows(text: str, grammar: str, vocabulary: LLTokenizer) -> bool:
    matcher: LLMatcher = compile_grammar(grammar, vocabulary)
    return matcher.consume_tokens(vocabulary.tokenize_str(text)) and matcher.is_accepting()


def refusal(checker: GuidanceChecker, text: str) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        asyncio.run(checker.check(text, "response_format"))
    assert caught.value.param == "response_format" and caught.value.message.startswith("response_format")
    return caught.value


# -- what texts mean ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"\d{3}-\d", "123-4", "١٢٣-٤"),  # ASCII digits, whatever Unicode calls a digit
        ("a/b", "a/b", "a\\/b"),
        ("a\nb", "a\nb", "ab"),
        ("^ab$", "ab", "abc"),
        ("ab", "ab", "xaby"),
        (r"[^\s]+é", "xé", "x é"),
        ("", "", "a"),
    ],
)
def test_a_regex_matches_the_whole_answer(pattern, good, bad, vocabulary):
    text = guidance.from_regex(pattern)
    assert follows(good, text, vocabulary) and not follows(bad, text, vocabulary)


def test_a_choice_is_one_of_its_texts_whatever_is_in_them(vocabulary):
    texts = ["yes", "a\"b\\c\n", "😀 /x/", "<eos>", "", "ye"]
    text = guidance.from_choice(texts)
    assert all(follows(one, text, vocabulary) for one in texts if one != "<eos>")
    assert not follows("yesye", text, vocabulary)


@pytest.mark.parametrize("texts", [[], "yes", ["a", 3]])
def test_a_choice_of_nothing_is_refused(texts):
    with pytest.raises(InvalidRequestError) as caught:
        guidance.from_choice(texts, param="guided_choice")
    assert caught.value.param == "guided_choice"


def test_json_is_on_one_line_with_at_most_a_space_between(vocabulary):
    text = guidance.from_json_schema(
        {"type": "object", "properties": {"a": {"type": "array"}, "b": {}}, "required": ["a", "b"], "title": "T"}
    )
    assert follows('{"a":[1,2],"b":"x y"}', text, vocabulary)
    assert follows('{"a": [1, 2], "b": null}', text, vocabulary)
    for spaced in ('{"a":  [1],"b":1}', '{\n"a":[1],"b":1}', '{ "a":[1],"b":1}', '{"b":1,"a":[1]}'):
        assert not follows(spaced, text, vocabulary)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, ["0", "-9007199254740991", "9007199254740991"], ["9007199254740992", "1" * 20]),
        ({"type": ["integer", "null"]}, ["null", "7"], ["1" * 20]),
        ({"type": "integer", "minimum": 5}, ["5", "9007199254740991"], ["4", "1" * 20]),
        ({"type": "integer", "exclusiveMaximum": 5}, ["4", "-9007199254740991"], ["5", "-" + "1" * 20]),
        ({"items": {"$ref": "#/$defs/i"}, "$defs": {"i": {"type": "integer"}}}, ["[1]"], [f"[{10**20}]"]),
        ({"type": "integer", "minimum": 10**17, "maximum": 2 * 10**17}, [str(10**17)], ["5"]),
        ({"type": "integer", "enum": [3, 10**17]}, ["3", str(10**17)], ["5"]),
    ],
)
def test_an_integer_ends(schema, good, bad, vocabulary):
    text = guidance.from_json_schema(schema)
    for answer in good:
        assert follows(answer, text, vocabulary), answer
    for answer in bad:
        assert not follows(answer, text, vocabulary), answer


def test_the_librarys_tokens_have_the_bytes_of_ours(tmp_path):
    files = write_folder(tmp_path, sentencepiece_backend())
    tokenizer, size = Tokenizer.from_files(files), 300
    library = load_vocabulary(tmp_path / "tokenizer.json", size, [2])
    texts = [i for i in range(size) if not library.is_special_token(i)]
    assert texts == [*range(3, 3 + 0xFF), *range(259, 264)]  # no token of text holds 0xFF; from 264 on there are none
    assert [library.decode_bytes([i]) for i in texts] == [tokenizer.token_bytes(i) for i in texts]


# A schema, a value that is valid and one that is not: a keyword that was ignored would let the second pass.
KEYWORDS: list[tuple[dict[str, Any], Any, Any]] = [
    ({"type": "string", "minLength": 2}, "ab", "a"),
    ({"type": "string", "maxLength": 2}, "ab", "abc"),
    ({"type": "string", "pattern": "^a+$"}, "aa", "b"),
    ({"type": "string", "pattern": "a"}, "bab", "b"),
    ({"type": "string", "pattern": "^[a-z]*$", "maxLength": 3}, "abc", "abcd"),
    ({"type": "string", "format": "date"}, "2024-02-03", "2024-13-03"),
    ({"type": "string", "format": "uuid"}, "123e4567-e89b-12d3-a456-426614174000", "123"),
    ({"type": "integer", "minimum": 3}, 3, 2),
    ({"type": "integer", "exclusiveMinimum": 3}, 4, 3),
    ({"type": "number", "maximum": 1.5}, 1.5, 1.6),
    ({"type": "number", "exclusiveMaximum": 2}, 1.99, 2),
    ({"type": "integer", "multipleOf": 5}, 15, 16),
    ({"type": "array", "items": {"type": "integer"}}, [1], ["a"]),
    ({"type": "array", "minItems": 1}, [1], []),
    ({"type": "array", "maxItems": 1}, [1], [1, 2]),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, [1], [1, 2]),
    ({"type": "object", "required": ["a"]}, {"a": 1}, {"b": 1}),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, {"a": 1}, {"a": "x"}),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, {"a": 1}, {"b": 1}),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}}, {"ab": 1}, {"ab": "x"}),
    ({"type": "object", "minProperties": 1}, {"a": 1}, {}),
    ({"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    ({"enum": ["x", 3, None]}, None, "y"),
    ({"enum": ["x", "long"], "maxLength": 2}, "x", "long"),
    ({"const": {"a": [1]}}, {"a": [1]}, {"a": [2]}),
    ({"type": ["string", "null"]}, None, 1),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, "x"),
    ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, 3, "x"),
    ({"allOf": [{"minimum": 3}, {"maximum": 5}], "type": "integer"}, 4, 6),
    ({"$ref": "#/$defs/n", "maximum": 5, "$defs": {"n": {"type": "integer", "minimum": 3}}}, 4, 6),
    ({"$ref": "#/definitions/n", "definitions": {"n": {"type": "integer"}}}, 4, "x"),
]


@pytest.mark.parametrize(("schema", "good", "bad"), KEYWORDS, ids=lambda value: json.dumps(value)[:50])
def test_no_keyword_that_is_accepted_is_ignored(schema, good, bad, checker, vocabulary):
    text = guidance.from_json_schema(schema)
    asyncio.run(checker.check(text, "response_format"))
    assert follows(json.dumps(good), text, vocabulary)
    assert not follows(json.dumps(bad), text, vocabulary)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("not", {}), ("if", {}), ("then", {}), ("else", {}), ("uniqueItems", True), ("contains", {}),
        ("minContains", 1), ("maxContains", 1), ("propertyNames", {}), ("dependentRequired", {}),
        ("dependentSchemas", {}), ("dependencies", {}), ("unevaluatedProperties", False), ("unevaluatedItems", False),
        ("$dynamicRef", "#a"), ("$recursiveRef", "#"), ("nullable", True), ("maxlength", 3), ("x-guidance", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["properties", "items", "anyOf", "$defs"])
def test_a_keyword_that_cannot_be_honoured_is_refused_by_name_wherever_it_stands(keyword, value, place, checker):
    inner: dict[str, Any] = {keyword: value}
    schema: dict[str, Any] = {
        "properties": {"type": "object", "properties": {"deep": inner}},
        "items": {"type": "array", "items": inner},
        "anyOf": {"anyOf": [{"type": "string"}, inner]},
        "$defs": {"type": "string", "$defs": {"unused": inner}},
    }[place]
    if keyword == "x-guidance":
        with pytest.raises(UnsupportedError, match=keyword):
            guidance.from_json_schema(inner)
        return
    error = refusal(checker, guidance.from_json_schema(schema))
    assert isinstance(error, UnsupportedError) and repr(keyword) in error.message and f"#/{place}" in error.message


def test_properties_may_be_called_like_keywords_and_annotations_are_fine(checker):
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "description": "D", "x-order": 1,
        "type": "object", "properties": {"not": {"type": "string", "default": "a", "examples": ["b"]}, "if": {}},
        "required": ["not"], "additionalProperties": False,
    }  # fmt: skip
    asyncio.run(checker.check(guidance.from_json_schema(schema), "response_format"))


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


STRING = {"type": "string"}
REFUSED: dict[str, dict[str, Any]] = {
    "http $ref": {"$ref": "http://127.0.0.1:1/schema.json"},
    "https $ref": {"type": "object", "properties": {"a": {"$ref": "https://example.com/x#/$defs/a"}}},
    "file $ref": {"$ref": "file:///etc/passwd"},
    "relative $ref": {"$ref": "other.json"},
    "$ref to nothing": {"$ref": "#/$defs/none"},
    "$ref in a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "unknown type": {"type": "strng"},
    "type of a wrong kind": {"type": 3},
    "unknown format": {"type": "string", "format": "colour"},
    "minLength of a wrong kind": {"type": "string", "minLength": "3"},
    "items of a wrong kind": {"type": "array", "items": 3},
    "properties of a wrong kind": {"type": "object", "properties": ["a"]},
    "no value is valid": {"type": "integer", "minimum": 5, "maximum": 3},
    "overlapping oneOf": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    "look-ahead": {"type": "string", "pattern": "(?=a)b"},
    "broken pattern": {"type": "string", "pattern": "("},
    "nested 400 deep": nested(400),
    "anyOf of 10,000": {"anyOf": [{"properties": {f"a{i}": STRING}, "required": [f"a{i}"]} for i in range(10_000)]},
    "10,000 properties": {"type": "object", "properties": {f"a{i}": STRING for i in range(10_000)}},
    "enum of 100,000": {"enum": [f"value {i}" for i in range(100_000)]},
    "exponential allOf": {
        "allOf": [{"anyOf": [{"properties": {f"k{j}": {"const": i}}} for i in range(4)]} for j in range(10)]
    },
    "huge multipleOf": {"type": "integer", "multipleOf": 999_999_937},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_served_is_refused_soon(name, checker):
    began = time.process_time()
    refusal(checker, guidance.from_json_schema(REFUSED[name]))
    assert time.process_time() - began < 2  # a bound, no measurement: FAULTS row 20; of all threads, not of others


@pytest.mark.parametrize(
    "text",
    [
        guidance.from_lark("start: ("), guidance.from_lark("begin: /a/"), guidance.from_lark(""),
        guidance.from_lark('start: %json {"$ref":"http://127.0.0.1:1/x"}'), guidance.from_lark("start: a\na: b\nb: a"),
        guidance.from_regex("(a"), guidance.from_regex(r"(a)\1"), guidance.from_regex(r"\bfoo"),
        guidance.from_regex("|".join(f"{i:09x}" for i in range(0, 30_000_000, 1000))),
        "", "start: /a/", "[]", "3", '{"grammars":3}', '{"grammars":[3]}', "[" * 100_000, '{"grammars":[{}]}',
        '{"grammars":[{"json_schema":{"x-guidance":{"lenient":true},"not":{}}}]}', "\x00",
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_grammar_that_cannot_be_served_is_refused_soon(text, checker):
    began = time.process_time()
    refusal(checker, text)
    assert time.process_time() - began < 2


def test_a_regex_that_no_utf_8_can_hold_is_refused():
    with pytest.raises(InvalidRequestError, match="guided_regex"):
        guidance.from_regex("a\ud800", param="guided_regex")


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa){1,5000}", "(.*a.{25}|.*b.{27})", "((a{1,100}){1,100}){1,100}"])
def test_a_regex_bomb_is_judged_soon(pattern, checker):
    began = time.process_time()
    try:
        asyncio.run(checker.check(guidance.from_regex(pattern), "guided_regex"))
    except InvalidRequestError as error:
        assert error.param == "guided_regex"
    assert time.process_time() - began < 2


def test_a_schema_too_deep_to_be_written_down_is_refused(checker):
    with pytest.raises(InvalidRequestError) as caught:
        guidance.from_json_schema(nested(200_000), param="response_format")
    assert caught.value.param == "response_format"


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_the_loop_goes_on_while_heavy_grammars_are_judged(checker):
    async def main():
        heavy = [guidance.from_json_schema({"enum": [f"{n} {i}" for i in range(8000)]}) for n in range(5)]
        ticks = 0
        checks = asyncio.gather(*(checker.check(text, "response_format") for text in heavy), return_exceptions=True)
        while not checks.done():
            await asyncio.sleep(0)
            ticks += 1
        assert ticks > 100

    asyncio.run(main())


def test_verdicts_are_bounded_and_refusals_are_remembered(checker):
    async def main():
        bad = guidance.from_regex("(")
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="unclosed group"):
                await checker.check(bad, "guided_regex")
        for i in range(MAX_VERDICTS + 10):
            await checker.check(guidance.from_choice([f"text {i}"]), "guided_choice")
        assert len(checker._verdicts) == MAX_VERDICTS
        checker.require(guidance.from_choice([f"text {MAX_VERDICTS}"]), "guided_choice")
        with pytest.raises(InvalidRequestError, match="was not checked"):
            checker.require(guidance.from_choice(["text 0"]), "guided_choice")

    asyncio.run(main())


def test_a_grammar_that_was_checked_again_is_not_forgotten_before_it_is_used(checker, monkeypatch):
    monkeypatch.setattr(guidance, "MAX_VERDICTS", 2)
    first, second, third = (guidance.from_choice([text]) for text in ("one", "two", "three"))

    async def main():
        for text in (first, second, first, third):
            await checker.check(text, "guided_choice")
        checker.require(first, "guided_choice")
        with pytest.raises(InvalidRequestError, match="was not checked"):
            checker.require(second, "guided_choice")

    asyncio.run(main())


def test_too_many_checks_at_once_are_turned_away(checker):
    async def main():
        texts = [guidance.from_choice([f"text {i}"]) for i in range(MAX_PENDING + 5)]
        checks = [checker.check(text, "guided_choice") for text in texts]
        results = await asyncio.gather(*checks, return_exceptions=True)
        assert [type(result) for result in results if result is not None] == [OverloadedError] * 5
        await checker.check(texts[-1], "guided_choice")  # there is room again

    asyncio.run(main())


def test_a_request_with_a_grammar_that_was_not_checked_is_refused(tmp_path):
    async def main():
        async with FakeEngine(tmp_path) as fake:
            params = SamplingParams(guidance=guidance.from_choice(["yes"]))
            with pytest.raises(InvalidRequestError, match="was not checked"):
                fake.engine.generate([1, 2], params, request_id="a")
            await fake.engine.check_guidance(params)
            async with fake.engine.generate([1, 2], params, request_id="a") as stream:
                assert [output async for output in stream]
            wrong = SamplingParams(guidance=guidance.from_regex("("))
            with pytest.raises(InvalidRequestError) as caught:
                await fake.engine.check_guidance(wrong, param="guided_regex")
            assert caught.value.param == "guided_regex"
            with pytest.raises(InvalidRequestError):
                fake.engine.generate([1, 2], wrong, request_id="b")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guidance", 3), ("guidance", "\ud800"), ("allowed_token_ids", ()), ("allowed_token_ids", (257,)),
        ("allowed_token_ids", (-1,)), ("allowed_token_ids", (True,)), ("allowed_token_ids", 3),
        ("allowed_token_ids", (0,) * 258), ("bad_words", "abc"), ("bad_words", ("",)), ("bad_words", ("a" * 129,)),
        ("bad_words", ("a",) * 129), ("bad_words", ("\ud800",)), ("bad_words", (3,)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value}).validate(257)
    assert caught.value.param == field and "allowed:" in caught.value.message
