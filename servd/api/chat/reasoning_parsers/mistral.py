"""[THINK]…[/THINK], as Magistral writes it, with special tokens.

Source: mistral-common's tokenizer v13.
"""

from __future__ import annotations

from servd.api.chat.reasoning_parsers import REASONING_PARSERS, ReasoningParser


@REASONING_PARSERS.register("mistral")
class MistralThink(ReasoningParser):
    """See the module."""

    opening, closing = "[THINK]", "[/THINK]"

    @classmethod
    def is_written_by(cls, template: str) -> bool:
        return cls.opening in template
