"""From a ChatCall to what the engine needs: prompt tokens and sampling settings; and to who reads the answer.

Knows nothing of dialects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from servd.api.chat.call import ChatCall
from servd.api.chat.parts import AnswerReader
from servd.api.service import InferenceService
from servd.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A conversation ready to be generated."""

    prompt_token_ids: list[int]
    params: SamplingParams
    new_reader: Callable[[], AnswerReader] | None  # one an answer; None: all text is the answer's own


async def plan_chat(service: InferenceService, call: ChatCall) -> ChatPlan:
    """Render and tokenize, off the event loop. Raises InvalidRequestError or UnsupportedError naming the field."""
    token_ids = await service.encode_chat(
        call.messages, add_generation_prompt=call.add_generation_prompt, template_kwargs=call.template_kwargs
    )
    return ChatPlan(token_ids, call.params, None)
