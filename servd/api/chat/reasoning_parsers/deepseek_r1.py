"""DeepSeek-R1's <think>…</think>, whose models think always: an answer begins inside, said or not.

To be chosen by name. Source: DeepSeek-R1's README.
"""

from __future__ import annotations

from servd.api.chat.reasoning_parsers import REASONING_PARSERS, ReasoningParser


@REASONING_PARSERS.register("deepseek_r1")
class DeepSeekR1(ReasoningParser):
    """See the module."""

    opening, closing = "<think>", "</think>"

    @classmethod
    def is_written_by(cls, template: str) -> bool:
        return False

    @classmethod
    def begins_inside(cls, prompt_end: str) -> bool:
        return not cls.is_over(prompt_end)
