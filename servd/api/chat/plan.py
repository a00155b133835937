"""From a ChatCall to what the engine needs: prompt tokens and sampling settings; and to who reads the answer.

Knows nothing of dialects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from servd.api.chat.call import ChatCall
from servd.api.chat.formats import ChatFormats
from servd.api.chat.parts import AnswerReader, Part, TextPart
from servd.api.chat.reading import StepReader, new_call_id
from servd.api.chat.tools import answer_guidance, callable_tools, check_tools, template_tools, told_in_text
from servd.api.service import InferenceService
from servd.errors import InvalidRequestError, UnsupportedError
from servd.sampling_params import SamplingParams

NUM_END_TOKENS = 16  # of the prompt, in which a thought may begin
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
THINKING_SWITCHES = ("enable_thinking", "thinking")  # what templates call it


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A conversation ready to be generated."""

    prompt_token_ids: list[int]
    params: SamplingParams
    new_reader: Callable[[], AnswerReader] | None  # one an answer; None: all text is the answer's own
    guidance_param: str = "response_format"  # what the client calls the field behind `params.guidance`


async def encode_call(service: InferenceService, call: ChatCall) -> list[int]:
    """The prompt's tokens, made off the event loop. Raises InvalidRequestError or UnsupportedError naming the field."""
    formats = await service.load_chat_formats()
    if not call.messages:
        raise InvalidRequestError("messages is empty; allowed: at least one message", param="messages")
    check_tools(call.tools, call.tool_choice)
    if callable_tools(call) and formats.tool_parser is None:
        raise UnsupportedError("tools is set; this server reads no tool calls (--tool-call-parser none)", param="tools")
    if call.continue_final_message:
        _check_continued(call)
    messages, shown_tools = call.messages, call.tools if call.tool_choice.mode != "none" else ()
    if not formats.template_knows_calls:
        told_tools = () if formats.template_knows_tools else shown_tools
        messages = told_in_text(messages, told_tools, takes_system=formats.takes_system)
    token_ids = await service.encode_chat(
        messages,
        add_generation_prompt=call.add_generation_prompt and not call.continue_final_message,
        continue_final_message=call.continue_final_message,
        template_kwargs=_template_kwargs(call, formats),
        tools=template_tools(shown_tools) if shown_tools and formats.template_knows_tools else None,
    )
    kept = service.num_kept_tokens(call.truncate_prompt_tokens, call.params.max_tokens)
    return token_ids if kept is None else token_ids[-kept:]


async def plan_chat(service: InferenceService, call: ChatCall) -> ChatPlan:
    """Render and tokenize, off the event loop. Raises InvalidRequestError or UnsupportedError naming the field."""
    token_ids = await encode_call(service, call)
    formats, tools = service.chat_formats, callable_tools(call)
    if formats.reasoning_parser is None and not tools and call.answer_format is None:
        return ChatPlan(token_ids, call.params, None)
    prompt_end = service.engine.tokenizer.decode(token_ids[-NUM_END_TOKENS:], False)
    params, param = call.params, "response_format"
    if grammar := answer_guidance(call, formats, prompt_end):
        if params.guidance is not None:
            raise InvalidRequestError(f"{grammar[1]}: another grammar is set too; allowed: one", param=grammar[1])
        params, param = msgspec.structs.replace(params, guidance=grammar[0]), grammar[1]
        await service.engine.check_guidance(params, param=param)
    markers, new_reader = _reader(call, formats, prompt_end, hides_special_tokens=params.skip_special_tokens)
    if params.skip_special_tokens and markers:
        shown = tuple(formats.token_ids[text] for text in markers)
        params = msgspec.structs.replace(params, shown_special_token_ids=shown)
    return ChatPlan(token_ids, params, new_reader, param)


def _check_continued(call: ChatCall) -> None:
    if not call.messages or call.messages[-1]["role"] != "assistant" or call.messages[-1].get("tool_calls"):
        raise InvalidRequestError(
            "continue_final_message is true; allowed: with a last message of role assistant, without tool_calls",
            param="continue_final_message",
        )


def _template_kwargs(call: ChatCall, formats: ChatFormats) -> dict[str, Any] | None:
    """The template's variables: the caller's own, documents, and how much to think."""
    given: dict[str, Any] = dict(call.template_kwargs or {})
    known = formats.template_variables
    if call.documents:
        if "documents" not in known:
            raise UnsupportedError("documents is set; this model's chat template takes none", param="documents")
        given["documents"] = [dict(document) for document in call.documents]
    effort = call.reasoning_effort
    if effort is None:
        return given or None
    if effort not in EFFORTS:
        raise InvalidRequestError(
            f"reasoning_effort is {effort[:100]!r}; allowed: {', '.join(EFFORTS)}", param="reasoning_effort"
        )
    switches = [name for name in THINKING_SWITCHES if name in known]
    if "reasoning_effort" in known:
        given.setdefault("reasoning_effort", effort)
    elif not switches and not (effort == "none" and formats.reasoning_parser is None):
        raise UnsupportedError(
            f"reasoning_effort is {effort!r}; this model's chat template cannot be told how much to think",
            param="reasoning_effort",
        )
    for name in switches:
        given.setdefault(name, effort != "none")
    return given or None


def _reader(
    call: ChatCall, formats: ChatFormats, prompt_end: str, *, hides_special_tokens: bool
) -> tuple[list[str], Callable[[], AnswerReader] | None]:
    """(special tokens that the reader must see, what makes a reader for an answer)."""
    reasoning, parser, tools = formats.reasoning_parser, formats.tool_parser, callable_tools(call)
    # In an answer that goes on from given words, or follows a closed thought, nothing is thought any more.
    if call.continue_final_message or reasoning is None or reasoning.is_over(prompt_end):
        reasoning = None
    markers = () if parser is None or not tools else parser.markers
    if reasoning is not None:
        markers += (reasoning.opening, reasoning.closing)
    special = [text for text in markers if text in formats.special]
    hidden = special if hides_special_tokens else []

    def new_thought_reader(hidden: Sequence[str]) -> AnswerReader:
        assert reasoning is not None
        read = partial(reasoning.read, is_inside=reasoning.begins_inside(prompt_end))
        return StepReader(read, new_call_id, hidden)

    def new_call_reader() -> AnswerReader:
        assert parser is not None
        return StepReader(partial(parser.read, tools=tools), parser.new_id, hidden)

    if not tools:
        return special, None if reasoning is None else partial(new_thought_reader, hidden)
    if reasoning is None:
        return special, new_call_reader
    return special, lambda: _Chain(new_thought_reader(()), new_call_reader())


class _Chain:
    """Two readers, the second of which reads the first one's text."""

    def __init__(self, first: AnswerReader, second: AnswerReader) -> None:
        self._first = first
        self._second = second

    def push(self, text: str) -> list[Part]:
        """See AnswerReader."""
        return self._pass_on(self._first.push(text))

    def finish(self) -> list[Part]:
        """See AnswerReader."""
        return self._pass_on(self._first.finish()) + self._second.finish()

    def _pass_on(self, parts: list[Part]) -> list[Part]:
        passed: list[Part] = []
        for part in parts:
            passed += self._second.push(part.text) if isinstance(part, TextPart) else [part]
        return passed
