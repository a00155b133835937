"""One answer's outputs as parts: text, reasoning, tool calls.

What the dialects with typed blocks share. Knows nothing of their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servd.api.chat.parts import Part, TextPart
from servd.api.chat.plan import ChatPlan
from servd.api.service import InferenceService
from servd.outputs import RequestOutput


class AnswerParts:
    """Reads the outputs of one answer in order."""

    def __init__(self, plan: ChatPlan) -> None:
        self._reader = None if plan.new_reader is None else plan.new_reader()

    def read(self, output: RequestOutput) -> list[Part]:
        """The parts that these news make certain; all that is left, with the last of them."""
        if self._reader is None:
            return [TextPart(output.text)] if output.text else []
        parts = self._reader.push(output.text) if output.text else []
        if output.finish_reason is not None:
            parts = [*parts, *self._reader.finish()]
        return parts


async def num_tokens(service: InferenceService, texts: list[str]) -> int:
    """Tokens of a text given in pieces: how much of an answer was reasoning."""
    if not texts:
        return 0
    text = "".join(texts)
    return len(await service.engine.run_in_thread(service.engine.tokenizer.encode, text, False))


def effort_kwargs(effort: str | None) -> Mapping[str, Any]:
    """What chat templates that know of it are told about how much to think."""
    if effort is None:
        return {}
    return {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
