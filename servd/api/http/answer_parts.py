"""One answer's outputs as parts: text, reasoning, tool calls.

What all dialects share. Knows nothing of their shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from servd.api.chat.parts import Part, TextPart
from servd.api.chat.plan import ChatPlan
from servd.api.service import InferenceService
from servd.errors import InvalidRequestError
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


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Errors speak of fields as a dialect calls them: where a key of `names` is in a field's name, its value stands."""
    try:
        yield
    except InvalidRequestError as error:
        message, param = error.message, error.param or ""
        for name, own in names.items():
            if name in param:
                message, param = message.replace(name, own, 1), param.replace(name, own, 1)
        if param == (error.param or ""):
            raise
        raise type(error)(message, param=param) from None
