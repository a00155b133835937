"""Incremental text equals the text of all tokens, however they arrive; stop strings never leak."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servd.engine.detokenizer import Detokenizer, StopStrings
from servd.engine.tokenizer import Tokenizer
from servd.hub import ModelFiles

TEXTS = [
    "Plain English, nothing special.",
    "👩‍👩‍👧‍👦🏳️‍🌈 family 🙂🙂 flags 🇩🇪🇯🇵",
    "敏捷的棕色狐狸跳过了懒狗。東京タワー、한국어 테스트",
    "e\u0301a\u0308 Z\u0351\u036b\u0343 ก็ นี่ हिन्दी",
    "<|im_start|>tokens<|im_end|> within",
    "\ufffd literal replacement \ufffd",
]


@pytest.fixture(scope="module")
def tokenizer(starter_files: ModelFiles) -> Tokenizer:
    return Tokenizer.from_files(starter_files)


@pytest.fixture(scope="module")
def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """Byte → the token that is this byte alone; the starter has none for 21 bytes."""
    return {data[0]: i for i in range(tokenizer.vocab_size) if len(data := tokenizer.token_bytes(i)) == 1}


class SentencePieceTokens:
    """Ids below 256 are bytes, 256 is "▁a", 257 is a special token, 258 is a lone space."""

    special_token_ids = frozenset({257})
    num_stripped_spaces = 1

    def token_bytes(self, token_id: int) -> bytes:
        return {256: b" a", 257: b"<s>", 258: b" "}.get(token_id) or bytes([token_id])


def pieces_of(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]


CUTS = st.lists(st.integers(0, 200), max_size=8)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49200), max_size=40), cuts=CUTS, skip=st.booleans())
def test_random_ids_in_any_split(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(detokenizer.push(piece) for piece in pieces_of(ids, cuts)) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=24), cuts=CUTS)
def test_any_bytes_one_token_a_byte(
    tokenizer: Tokenizer, byte_ids: dict[int, int], data: bytes, cuts: list[int]
) -> None:
    ids = [byte_ids[byte] for byte in data if byte in byte_ids]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(piece) for piece in pieces_of(ids, cuts)) + detokenizer.flush()
    assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_real_text_token_by_token_has_no_half_characters(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    sent = ""
    for token_id in tokenizer.encode(text):
        sent += detokenizer.push([token_id])
        assert text.startswith(sent)
    assert sent + detokenizer.flush() == text


def test_a_character_waits_until_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["🙂"]


def test_unfinished_character_becomes_a_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(tokenizer.encode("ok") + tokenizer.encode("🙂")[:-1]) == "ok"
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_skipped_or_shown(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("hi"), 2]
    assert Detokenizer(tokenizer).push(ids) == "hi"
    assert Detokenizer(tokenizer, skip_special_tokens=False).push(ids) == "hi<|im_end|>"


def test_sentencepiece_space_is_stripped_once_at_the_start() -> None:
    detokenizer = Detokenizer(SentencePieceTokens())
    assert [detokenizer.push([i]) for i in (257, 256, 256, 258)] == ["", "a", " a", " "]
    assert Detokenizer(SentencePieceTokens()).push([258, 258, 256]) == "  a"
    assert Detokenizer(SentencePieceTokens(), skip_special_tokens=False).push([257, 256]) == "<s> a"


def test_text_that_continues_a_prompt_keeps_its_space() -> None:
    assert Detokenizer(SentencePieceTokens(), continues_text=True).push([256, 256]) == " a a"


# ---- stop strings ----


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, int, str] | None:
    """The definition, by brute force: grow the text by one character until a stop is complete; the longest counts."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return end - len(stop), end, stop
    return None


@settings(max_examples=1000, deadline=None)
@given(
    text=st.text(alphabet="ab🙂", max_size=24),
    stops=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=5), max_size=4).map(tuple),
    cuts=CUTS,
    include=st.booleans(),
)
def test_stops_by_definition_in_any_split(text: str, stops: tuple[str, ...], cuts: list[int], include: bool) -> None:
    checker = StopStrings(stops, include)
    expected = first_stop(text, stops)
    whole = text if expected is None else text[: expected[1] if include else expected[0]]
    sent, matched = "", None
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for start, end in zip(edges, edges[1:], strict=False):
        new, stop = checker.push(text[start:end])
        sent += new
        matched = matched or stop
        assert whole.startswith(sent)
    sent += checker.flush()
    assert sent == whole
    assert matched == (expected[2] if expected else None)


def test_only_what_could_begin_a_stop_is_held_back() -> None:
    checker = StopStrings(("\n\nUser:", "END"), include=False)
    assert checker.push("Hello\n") == ("Hello", None)
    assert checker.push("\nUs") == ("", None)
    assert checker.push("e it, E") == ("\n\nUse it, ", None)
    assert checker.push("ND of") == ("", "END")
    assert checker.push(" story") == ("", None)
    assert checker.flush() == ""


def test_the_first_complete_stop_counts_and_the_longest_of_those() -> None:
    assert StopStrings(("bc", "abcd", "abc"), include=False).push("xabcd") == ("x", "abc")
    assert StopStrings(("b", "abc"), include=True).push("xabc") == ("xab", "b")


def test_no_stops_hold_nothing_back() -> None:
    assert StopStrings((), include=False).push("text") == ("text", None)


def test_held_text_comes_out_at_the_end() -> None:
    checker = StopStrings(("###",), include=False)
    assert checker.push("a##") == ("a", None)
    assert (checker.flush(), checker.flush()) == ("##", "")
