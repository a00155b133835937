"""What all parsers of answers share: text that arrives in pieces read in a straight line, and parts put together.

A parser is a generator that yields wherever it needs more text; cuts fall between its lines, so they cannot change
what it finds. Knows nothing of any one format.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Generator, Sequence

from servd.api.chat.parts import Part, ReasoningPart, TextPart, ToolCallPart

Steps = Generator[None, None, None]
Found = Generator[None, None, bool]

_SPACE = re.compile(r"\s+")


class Source:
    """The text of an answer so far, from where the parser stands."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._is_complete = False
        self._held: list[str] | None = None

    def feed(self, text: str, *, is_complete: bool = False) -> None:
        """Add text; `is_complete`: no more will come."""
        self._text = self._text[self._at :] + text
        self._at = 0
        self._is_complete = self._is_complete or is_complete

    def hold(self, text: str = "") -> None:
        """Keep what is taken from here on, as if `text` had been taken first, until `release`."""
        self._held = [text]

    def release(self) -> str:
        """What was taken since `hold`."""
        held = "".join(self._held or ())
        self._held = None
        return held

    def take(self, count: int) -> str:
        """The next `count` characters, which must be there."""
        piece = self._text[self._at : self._at + count]
        assert len(piece) == count, f"{count} characters taken of {piece!r}"
        self._at += count
        if self._held is not None:
            self._held.append(piece)
        return piece

    def waiting(self) -> str:
        """What is there and not yet taken."""
        return self._text[self._at :]

    def run(self, pattern: re.Pattern[str]) -> str:
        """Take what matches of the text that is there: of a run that may go on in the next piece, the part so far."""
        match = pattern.match(self._text, self._at)
        return self.take(match.end() - match.start()) if match else ""

    def peek(self, count: int = 1) -> Generator[None, None, str]:
        """The next `count` characters, not taken; fewer at the end of the answer."""
        while len(self._text) - self._at < count and not self._is_complete:
            yield
        return self._text[self._at : self._at + count]

    def literal(self, text: str) -> Found:
        """Take `text` if it comes next; waits only while that is open."""
        for count in range(1, len(text) + 1):
            if (yield from self.peek(count)) != text[:count]:
                return False
        self.take(len(text))
        return True

    def closing(self, text: str) -> Found:
        """`literal`, for what ends a call: a beginning of it in which the answer breaks off is taken too."""
        if (yield from self.literal(text)):
            return True
        rest = self.waiting()
        is_cut = self._is_complete and rest != "" and text.startswith(rest)
        if is_cut:
            self.take(len(rest))
        return is_cut

    def word(self, pattern: re.Pattern[str]) -> Generator[None, None, str]:
        """Take all that matches, however it is cut; `pattern` is a run of characters of one class."""
        pieces = []
        while (yield from self.more()) and (piece := self.run(pattern)):
            pieces.append(piece)
        return "".join(pieces)

    def spaces(self) -> Generator[None, None, str]:
        """Take white space."""
        taken = []
        while (yield from self.peek()).isspace():
            taken.append(self.run(_SPACE))
        return "".join(taken)

    def more(self) -> Found:
        """Wait for text; False at the end of the answer."""
        return (yield from self.peek()) != ""


class Writer:
    """Collects parts; neighbours of one kind become one. White space around calls is left out of the text."""

    def __init__(self, new_id: Callable[[], str], hidden: Sequence[str] = ()) -> None:
        """`hidden`: special tokens that are in the text for the parser's sake, and never shown."""
        self._new_id = new_id
        self._hidden = hidden
        self._hidden_pattern = re.compile("|".join(map(re.escape, hidden)))
        self._begun = ""  # of a hidden token
        self._parts: list[tuple[type[Part], int, str | None, str | None, list[str]]] = []
        self._spaces: list[str] = []  # of the text's end: sent when more text follows
        self._num_calls = 0
        self._is_after_call = False

    def text(self, text: str) -> None:
        """Text of the answer itself."""
        if self._hidden:
            *shown, last = self._hidden_pattern.split(self._begun + text)
            keep = max(begun_length(last, token) for token in self._hidden)
            self._begun = last[len(last) - keep :]
            text = "".join(shown) + last[: len(last) - keep]
        self._show(text)

    def _show(self, text: str) -> None:
        visible = text.rstrip()
        if visible:
            self._add(TextPart, 0, "".join(self._spaces) + visible)
            self._spaces.clear()
            self._is_after_call = False
        if len(visible) < len(text):
            self._spaces.append(text[len(visible) :])

    def reasoning(self, text: str) -> None:
        """Text of what was thought."""
        self._add(ReasoningPart, 0, text)

    def begin_call(self, name: str) -> None:
        """A call of `name` begins; `arguments` adds to it until the next one."""
        self._show(self._begun)
        self._begun = ""
        self._spaces.clear()
        self._is_after_call = True
        self._parts.append((ToolCallPart, self._num_calls, self._new_id(), name, []))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        self._add(ToolCallPart, self._num_calls - 1, text)

    def end(self) -> None:
        """The answer is complete."""
        self._show(self._begun)
        if not self._is_after_call and self._spaces:
            self._add(TextPart, 0, "".join(self._spaces))
        self._spaces.clear()

    def parts(self) -> list[Part]:
        """The parts since the last time."""
        found, self._parts = self._parts, []
        return [_part(*part) for part in found]

    def _add(self, kind: type[Part], index: int, text: str) -> None:
        if not text:
            return
        if not self._parts or self._parts[-1][:2] != (kind, index):
            self._parts.append((kind, index, None, None, []))
        self._parts[-1][4].append(text)


def _part(kind: type[Part], index: int, call_id: str | None, name: str | None, pieces: list[str]) -> Part:
    text = "".join(pieces)
    return ToolCallPart(index, text, call_id, name) if kind is ToolCallPart else kind(text)  # type: ignore[call-arg, arg-type]


class StepReader:
    """An AnswerReader that runs a parser's steps."""

    def __init__(
        self, read: Callable[[Source, Writer], Steps], new_id: Callable[[], str], hidden: Sequence[str] = ()
    ) -> None:
        """`hidden`: see Writer."""
        self._source = Source()
        self._writer = Writer(new_id, hidden)
        self._steps = read(self._source, self._writer)

    def push(self, text: str) -> list[Part]:
        """See AnswerReader."""
        self._source.feed(text)
        next(self._steps, None)
        return self._writer.parts()

    def finish(self) -> list[Part]:
        """See AnswerReader."""
        self._source.feed("", is_complete=True)
        for _ in self._steps:
            raise AssertionError("a parser waits for more than the whole answer")
        self._writer.end()
        return self._writer.parts()


def text_until(source: Source, writer: Writer, markers: Sequence[str]) -> Generator[None, None, str]:
    """Write text up to the first of `markers`, none of which holds another, and take that; "" at the answer's end."""
    while True:
        waiting = source.waiting()
        found = [(at, marker) for marker in markers if (at := waiting.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            writer.text(source.take(at))
            return source.take(len(marker))
        keep = max((begun_length(waiting, marker) for marker in markers), default=0)
        writer.text(source.take(len(waiting) - keep))
        if len((yield from source.peek(keep + 1))) <= keep:
            writer.text(source.take(keep))
            return ""


def begun_length(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def new_call_id() -> str:
    """An id as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"
