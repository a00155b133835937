"""<think>…</think>, as Qwen3 and most others write it: the answer begins inside if the prompt ends in <think>.

Source: Qwen3's chat template.
"""

from __future__ import annotations

from servd.api.chat.reasoning_parsers import REASONING_PARSERS, ReasoningParser


@REASONING_PARSERS.register("think", "qwen3")
class Think(ReasoningParser):
    """See the module."""

    opening, closing = "<think>", "</think>"

    @classmethod
    def is_written_by(cls, template: str) -> bool:
        return cls.opening in template or cls.closing in template
