"""Reasoning parsers: thought and answer told apart, whatever the pieces they come in."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servd.api.chat.parts import ReasoningPart, TextPart
from servd.api.chat.reasoning_parsers import REASONING_PARSERS
from tests.unit.api.chat.reading_helpers import Seen, reasoning_reader, seen

NAMES = REASONING_PARSERS.discover()

EXAMPLES: list[tuple[str, bool, str, Seen]] = [
    ("think", False, "Just this. ", ("Just this. ", None, [])),
    ("think", False, "<think>\nWhy?\n\nSo.\n</think>\n\nYes.", ("Yes.", "Why?\n\nSo.", [])),
    ("think", True, "Why?\n</think>\n\nYes.", ("Yes.", "Why?", [])),
    ("think", True, "<think>Why?</think>Yes.", ("Yes.", "Why?", [])),
    ("think", True, "cut o", ("", "cut o", [])),
    ("think", True, "cut </thi", ("", "cut </thi", [])),
    ("think", False, "<think>\n\n</think>\n\nYes.", ("Yes.", None, [])),
    ("think", False, "It writes <think> and </think>.", ("It writes <think> and </think>.", None, [])),
    ("deepseek_r1", True, "Hm\n</think>\nYes.\n", ("Yes.\n", "Hm", [])),
    ("mistral", False, "[THINK]Hm[/THINK]Yes.", ("Yes.", "Hm", [])),
]


@pytest.mark.parametrize(("name", "is_inside", "text", "expected"), EXAMPLES)
def test_examples(name: str, is_inside: bool, text: str, expected: Seen) -> None:
    assert seen(reasoning_reader(name, is_inside=is_inside), text) == expected
    assert seen(reasoning_reader(name, is_inside=is_inside), text, range(1, len(text))) == expected


PIECES = ["<think>", "</think>", "[THINK]", "[/THINK]", "<", "/", " ", "\n", "a"]


@pytest.mark.parametrize("name", NAMES)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=20),
    seed=st.integers(0, 2**32),
    is_inside=st.booleans(),
)
def test_cuts_do_not_matter(name: str, pieces: list[str], seed: int, is_inside: bool) -> None:
    text = "".join(pieces)
    draw = random.Random(seed)
    cuts = [draw.randint(0, len(text)) for _ in range(draw.randint(0, 8))]
    whole = seen(reasoning_reader(name, is_inside=is_inside), text)
    assert seen(reasoning_reader(name, is_inside=is_inside), text, cuts) == whole


@pytest.mark.parametrize("name", NAMES)
def test_every_parser_knows_where_an_answer_begins(name: str) -> None:
    parser = REASONING_PARSERS.get(name)
    assert parser.begins_inside(f"<|assistant|>{parser.opening}\n")
    assert parser.is_over(f"{parser.opening}\n\n{parser.closing}\n\n")
    assert not parser.begins_inside(f"{parser.opening}\n\n{parser.closing}\n\n")


def test_templates_tell_the_format() -> None:
    for template, expected in [("{{ '<think>\\n' }}", {"think", "qwen3"}), ("[THINK]", {"mistral"}), ("plain", set())]:
        assert {name for name in NAMES if REASONING_PARSERS.get(name).is_written_by(template)} == expected


def test_thought_comes_at_once() -> None:
    reader = reasoning_reader("think", is_inside=True)
    assert reader.push("Hm") == [ReasoningPart("Hm")]
    assert reader.push("m </th") == [ReasoningPart("m")]
    assert reader.push("ink>Yes") == [TextPart("Yes")]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_answers_take_linear_time(name: str) -> None:
    began = time.monotonic()
    for text in (" " * 100_000, "<think>" * 15_000, "</" * 50_000, "\n<" * 50_000):
        seen(reasoning_reader(name, is_inside=True), text)
        text = text[:20_000]
        seen(reasoning_reader(name, is_inside=True), text, range(1, len(text)))
    assert time.monotonic() - began < 30, "a bound on hangs: quadratic work would take minutes"
