"""How models write what they think before they answer: one file a format.

Knows nothing of tool calls: what follows the thought is text to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from servd.api.chat.reading import Source, Steps, Writer, begun_length
from servd.registry import Registry


class ReasoningParser(ABC):
    """A format: a thought between `opening` and `closing`, then the answer.

    Both may be special tokens of a vocabulary: they are kept in an answer's text for the parser.
    """

    opening: ClassVar[str]
    closing: ClassVar[str]

    @classmethod
    @abstractmethod
    def is_written_by(cls, template: str) -> bool:
        """Whether a model with this chat template writes the format. At most one format claims a template."""

    @classmethod
    def begins_inside(cls, prompt_end: str) -> bool:
        """Whether the answer's first words are thought already. `prompt_end`: the prompt's last characters."""
        return prompt_end.rstrip().endswith(cls.opening)

    @classmethod
    def is_over(cls, prompt_end: str) -> bool:
        """Whether the prompt has closed the thought, so that the answer follows at once."""
        return prompt_end.rstrip().endswith(cls.closing)

    @classmethod
    def read(cls, source: Source, writer: Writer, *, is_inside: bool) -> Steps:
        """Parse an answer to its end. White space around the thought is left out."""
        blanks = yield from source.spaces()
        if (yield from source.literal(cls.opening)) or is_inside:
            yield from source.spaces()
            yield from _thought(source, writer, cls.closing)
            yield from source.spaces()
        else:
            writer.text(blanks)
        while (yield from source.more()):
            writer.text(source.take(len(source.waiting())))


def _thought(source: Source, writer: Writer, closing: str) -> Steps:
    """Write the thought up to `closing`, which is taken, or the answer's end."""
    held: list[str] = []  # white space that may turn out to be the thought's end
    while (yield from source.more()):
        waiting = source.waiting()
        at = waiting.find(closing)
        keep = 0 if at >= 0 else begun_length(waiting, closing)
        piece = source.take(at if at >= 0 else len(waiting) - keep)
        visible = piece.rstrip()
        if visible:
            writer.reasoning("".join(held) + visible)
            held.clear()
        held.append(piece[len(visible) :])
        if at >= 0:
            source.take(len(closing))
            return
        if keep and len((yield from source.peek(keep + 1))) <= keep:
            writer.reasoning("".join(held) + source.take(keep))
            return


REASONING_PARSERS: Registry[type[ReasoningParser]] = Registry("reasoning parser", __name__)
