"""What an answer is made of, in the order in which it comes: reasoning, text, tool calls.

Knows nothing of how a model writes them (the parsers) nor of how a dialect shows them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A piece of call `index` (0, 1, …). The first piece of a call has its id and name; later ones have neither."""

    index: int
    arguments: str  # the next piece of the arguments' JSON text
    id: str | None = None
    name: str | None = None


Part = TextPart | ReasoningPart | ToolCallPart


class AnswerReader(Protocol):
    """Reads one answer's text as it grows, and tells its parts apart.

    However the text is cut into pieces, the parts joined by kind and index are the same.
    """

    def push(self, text: str) -> list[Part]:
        """The parts that `text` makes certain."""

    def finish(self) -> list[Part]:
        """What was held back, once the answer has ended."""


@dataclass(slots=True)
class CompletedCall:
    """A whole tool call."""

    id: str
    name: str
    arguments: str  # JSON text


@dataclass(slots=True)
class Message:
    """A whole answer, put together from its parts."""

    texts: list[str] = field(default_factory=list)
    reasonings: list[str] = field(default_factory=list)
    _calls: dict[int, tuple[str, str, list[str]]] = field(default_factory=dict)  # index → id, name, arguments

    def add(self, parts: list[Part]) -> None:
        """Take in the next parts."""
        for part in parts:
            match part:
                case TextPart():
                    self.texts.append(part.text)
                case ReasoningPart():
                    self.reasonings.append(part.text)
                case ToolCallPart():
                    if part.id is not None and part.name is not None:
                        self._calls[part.index] = (part.id, part.name, [])
                    self._calls[part.index][2].append(part.arguments)

    @property
    def text(self) -> str:
        """The answer itself."""
        return "".join(self.texts)

    @property
    def reasoning(self) -> str | None:
        """What was thought; None if nothing was."""
        return "".join(self.reasonings) if self.reasonings else None

    @property
    def tool_calls(self) -> list[CompletedCall]:
        """The calls, in order."""
        return [CompletedCall(i, name, "".join(pieces)) for i, name, pieces in self._calls.values()]
