"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages, whole or as events.

Knows nothing of chat templates. Errors on these paths have Anthropic's shape.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from aiohttp import web

from servd.api.chat.call import ChatCall
from servd.api.chat.plan import ChatPlan, encode_call, plan_chat
from servd.api.http.answer_parts import AnswerParts, in_words_of, num_tokens
from servd.api.http.anthropic.answer import MessageAnswer, error_event
from servd.api.http.anthropic.blocks import template_messages
from servd.api.http.anthropic.schema import Conversation, CountTokensRequest, MessagesRequest
from servd.api.http.context import SERVICE
from servd.api.http.decode import decode_body, read_body
from servd.api.http.dialect_reply_types import AnthropicErrorReply, AnthropicMessage, InputTokens
from servd.api.http.errors import as_servd_error
from servd.api.http.event_stream import send_events
from servd.api.http.generation import start_streams
from servd.api.http.openapi import GENERATES, Endpoint, Operation
from servd.api.http.replies import json_reply
from servd.api.http.resumable_streams import EventSource
from servd.api.http.schema import renamed
from servd.api.service import InferenceService
from servd.engine.result_stream import ResultStream
from servd.errors import ServdError, UnsupportedError
from servd.sampling_params import SamplingParams

_MESSAGES = msgspec.json.Decoder(MessagesRequest)
_COUNT_TOKENS = msgspec.json.Decoder(CountTokensRequest)
# What the plan calls them → what they are called here.
_NAMES = {
    ".function.parameters": ".input_schema",
    ".function.": ".",
    "reasoning_effort": "output_config.effort",
    "continue_final_message": "messages",
}
_log = logging.getLogger("servd.http")


async def create_message(request: web.Request) -> web.StreamResponse:
    """Answer to a conversation."""
    service = request.app[SERVICE]
    body = decode_body(await read_body(request), _MESSAGES)
    service.check_model(body.model)
    body.check()
    generation = body.generation()
    with renamed("stop", "stop_sequences"):
        params = generation.sampling_params(
            service.engine.tokenizer.vocab_size,
            service.engine.sampling_defaults,
            max_tokens=body.max_tokens,
            logprobs=None,
            prompt_logprobs=None,
        )
    service.engine.check_room()
    call = await _call(service, body, params)
    with in_words_of(_names(call)):
        plan = await plan_chat(service, call)
    message_id = service.new_request_id("msg")
    with renamed("guidance", plan.guidance_param):
        [stream] = await start_streams(
            request, generation, [plan.prompt_token_ids], plan.params, message_id, ["messages"]
        )
    making = _Making(service, plan, stream, message_id)
    if body.stream:
        return await send_events(request, message_id, making.events(), reads=[stream])
    async for _ in making.events():
        pass
    if making.failure is not None:
        raise making.failure
    return json_reply(making.answer.as_dict())


async def count_tokens(request: web.Request) -> web.Response:
    """How long the prompt of the same conversation is."""
    service = request.app[SERVICE]
    body = decode_body(await read_body(request), _COUNT_TOKENS)
    service.check_model(body.model)
    body.check()
    call = await _call(service, body, SamplingParams(max_tokens=1))
    with in_words_of(_names(call)):
        return json_reply({"input_tokens": len(await encode_call(service, call))})


def _names(call: ChatCall) -> dict[str, str]:
    return _NAMES | ({"reasoning_effort": "thinking.type"} if call.reasoning_effort == "none" else {})


async def _call(service: InferenceService, body: Conversation, params: SamplingParams) -> ChatCall:
    """What is asked. Raises InvalidRequestError or UnsupportedError naming the client's field."""
    formats = await service.load_chat_formats()
    if body.thinking is not None and body.thinking.type == "enabled" and formats.reasoning_parser is None:
        raise UnsupportedError(
            "thinking.type is 'enabled'; this model does not think (or --reasoning-parser is not set); allowed: "
            "'adaptive', 'disabled'",
            param="thinking.type",
        )
    messages = template_messages(body.system, body.messages)
    tools, tool_choice = body.call_tools()
    is_begun = messages[-1]["role"] == "assistant"  # the answer goes on from the words that the client gave it
    return ChatCall(
        messages,
        params,
        tools,
        tool_choice,
        body.answer_format(),
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
        template_kwargs=body.template_kwargs,
        reasoning_effort=body.reasoning_effort,
    )


class _Making:
    """Reads one answer, and tells of it in events."""

    def __init__(self, service: InferenceService, plan: ChatPlan, stream: ResultStream, message_id: str) -> None:
        self.answer = MessageAnswer(message_id, service.model_name)
        self.failure: ServdError | None = None
        self._service = service
        self._parts = AnswerParts(plan)
        self._stream = stream

    async def events(self) -> EventSource:
        """All events. Ends the stream, however it ends itself."""
        answer, begun = self.answer, False
        try:
            async for output in self._stream:
                if output.error is not None:
                    _log.warning("message stream ends with an error: %s", output.error.code)
                    self.failure = output.error
                    yield [error_event(output.error)]
                    return
                news = [] if begun else answer.begin(output)
                begun = True
                news += answer.add(self._parts.read(output))
                if output.finish_reason is not None:
                    thinking_tokens = await num_tokens(self._service, answer.reasonings)
                    news += answer.finish(output, thinking_tokens=thinking_tokens)
                if news:
                    yield news
        except Exception as error:
            _log.error("a message stream failed", exc_info=error)
            self.failure = as_servd_error(error)
            yield [error_event(self.failure)]
        finally:
            await self._stream.aclose()


ROUTES = [
    Endpoint(
        "POST", "/v1/messages", create_message,
        Operation(
            "Answer, in Anthropic's dialect", body=MessagesRequest, reply=AnthropicMessage, events=dict[str, Any],
            errors=GENERATES, error=AnthropicErrorReply,
        ),
    ),
    Endpoint(
        "POST", "/v1/messages/count_tokens", count_tokens,
        Operation(
            "Count the tokens of a call", body=CountTokensRequest, reply=InputTokens, errors=GENERATES,
            error=AnthropicErrorReply,
        ),
    ),
]  # fmt: skip
