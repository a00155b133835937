"""How models write tool calls: one file a format, each with its parser and the grammar that forces it.

Knows nothing of HTTP or engines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from servd.api.chat.call import Tool
from servd.api.chat.reading import Source, Steps, Writer, new_call_id
from servd.registry import Registry


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """Lark fragments of an answer's calls: [marker] first (following)* end.

    `rules` define what the fragments use; no name in them is start, text or begins with servd. Without a `marker`,
    an answer that begins with `opens` is a call, and any other is text.
    """

    rules: str
    first: str
    following: str
    end: str = ""
    marker: str | None = None
    opens: str = ""


class ToolParser(ABC):
    """A format. `markers` are texts that may be special tokens of a vocabulary: they are kept in an answer's text."""

    markers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, template: str) -> None:
        """`template`: the source of the model's chat template, which may choose between two ways of a format."""
        self.template = template

    @staticmethod
    @abstractmethod
    def is_written_by(template: str) -> bool:
        """Whether a model with this chat template writes the format. At most one format claims a template."""

    @abstractmethod
    def read(self, source: Source, writer: Writer, tools: Sequence[Tool]) -> Steps:
        """Parse an answer to its end. Linear in its length; what is no call is text, and nothing is lost.

        Answers may break off anywhere: a call whose name and arguments have begun stays one, its arguments as far as
        they came; before that it is text; behind a call's arguments, a closing tag that is cut short is no text.
        """

    @abstractmethod
    def grammar(self, tools: Sequence[Tool], marker: Callable[[str], str]) -> CallGrammar:
        """What calls of `tools` look like, so that `read` finds them. `marker`: a text of `markers` as a Lark term."""

    def new_id(self) -> str:
        """An id for a call."""
        return new_call_id()


TOOL_PARSERS: Registry[type[ToolParser]] = Registry("tool call parser", __name__)
