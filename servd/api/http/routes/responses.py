"""/v1/responses: OpenAI's Responses, made at once, as events, or in the background, and kept for later.

Knows nothing of chat templates or of how items are kept.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from servd.api.chat.call import ChatCall
from servd.api.chat.plan import ChatPlan, encode_call, plan_chat
from servd.api.http.answer_parts import AnswerParts, in_words_of, num_tokens
from servd.api.http.context import CALLER, RESPONSES, SERVICE
from servd.api.http.decode import decode_body, read_body
from servd.api.http.dialect_reply_types import DeletedResponse, ResponseInputTokens
from servd.api.http.errors import as_servd_error
from servd.api.http.event_stream import send_events, send_pieces
from servd.api.http.generation import start_streams
from servd.api.http.openapi import GENERATES, Endpoint, Operation
from servd.api.http.replies import chat_logprobs, json_reply
from servd.api.http.responses.answer import ResponseAnswer, usage_dict
from servd.api.http.responses.items import Item, read_input, template_messages
from servd.api.http.responses.query import PAGE_QUERY, STREAM_QUERY, item_page, stream_position
from servd.api.http.responses.schema import LOGPROBS, ResponseRequest
from servd.api.http.responses.store import BackgroundRun, StoredResponse
from servd.api.http.resumable_streams import EventSource
from servd.api.http.schema import renamed
from servd.api.service import InferenceService
from servd.engine.result_stream import ResultStream
from servd.errors import InvalidRequestError, NotFoundError, OverloadedError, UnsupportedError
from servd.outputs import RequestOutput
from servd.sampling_params import SamplingParams

_DECODER = msgspec.json.Decoder(ResponseRequest)
# What the plan calls them → what they are called here.
_NAMES = {".function.": ".", "reasoning_effort": "reasoning.effort", "messages": "input"}
_log = logging.getLogger("servd.http")


async def create_response(request: web.Request) -> web.StreamResponse:
    """Answer to items."""
    service, store, tenant = request.app[SERVICE], request.app[RESPONSES], request[CALLER].tenant
    body = decode_body(await read_body(request), _DECODER)
    service.check_model(body.model)
    body.check()
    items, messages = _conversation(request, body)
    service.engine.check_room()
    plan = await _plan(service, body, messages)
    response_id = f"resp_{uuid.uuid4().hex}"
    with renamed("max_tokens", "max_output_tokens"), renamed("guidance", plan.guidance_param):
        [stream] = await start_streams(
            request, body.generation(), [plan.prompt_token_ids], plan.params, response_id, ["input"]
        )
    answer = ResponseAnswer(_head(service, body, plan.params, response_id), queued=bool(body.background))
    stored = StoredResponse(response_id, body.previous_response_id, msgspec.json.encode(items))
    making = _Making(service, answer, plan, stream, on_end=stored.complete)
    if body.background:
        try:
            stored.run = BackgroundRun(answer, stream, tenant)
            store.add(tenant, stored)
        except BaseException:
            await stream.aclose()
            raise
        stored.run.start(making.events())
        if body.stream:
            return await send_pieces(request, stored.run.events_after(-1))
        return _json(stored)
    if body.store is not False:
        making.on_end = lambda answer: _keep(request, stored, answer)
    if body.stream:
        resumable = body.stream_options is not None and body.stream_options.resumable
        return await send_events(request, response_id, making.events(), reads=[stream], resumable=resumable)
    async for _ in making.events():
        pass
    if answer.failure is not None:
        raise answer.failure
    return json_reply(answer.as_dict())


async def count_input_tokens(request: web.Request) -> web.Response:
    """How long the prompt of the same response would be."""
    service = request.app[SERVICE]
    body = decode_body(await read_body(request), _DECODER)
    service.check_model(body.model)
    body.check()
    _, messages = _conversation(request, body)
    call = _call(service, body, messages)
    with in_words_of(_NAMES):
        token_ids = await encode_call(service, call)
    return json_reply({"object": "response.input_tokens", "input_tokens": len(token_ids)})


def _conversation(request: web.Request, body: ResponseRequest) -> tuple[list[Item], list[dict[str, Any]]]:
    """The items of this call, and the messages that they make after those of what it goes on from."""
    items = read_input(body.input, lambda prefix: f"{prefix}_{uuid.uuid4().hex}")
    history = request.app[RESPONSES].history(request[CALLER].tenant, body.previous_response_id)
    if not items and not history:
        raise InvalidRequestError("input is missing or empty; allowed: a string, or a list of items", param="input")
    return items, template_messages(body.instructions, [*history, *items])


def _call(service: InferenceService, body: ResponseRequest, messages: list[dict[str, Any]]) -> ChatCall:
    """What is asked. Raises InvalidRequestError or UnsupportedError naming the client's field."""
    with renamed("max_tokens", "max_output_tokens"):
        params = body.generation().sampling_params(
            service.engine.tokenizer.vocab_size,
            service.engine.sampling_defaults,
            max_tokens=body.max_output_tokens,
            logprobs=(body.top_logprobs or 0) if body.shows_logprobs else None,
            prompt_logprobs=None,
        )
    tools, tool_choice = body.call_tools()
    return ChatCall(
        messages,
        params,
        tools,
        tool_choice,
        body.answer_format(),
        template_kwargs=body.chat_template_kwargs,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )


async def _plan(service: InferenceService, body: ResponseRequest, messages: list[dict[str, Any]]) -> ChatPlan:
    """What the engine needs. Raises InvalidRequestError or UnsupportedError naming the client's field."""
    call = _call(service, body, messages)
    with in_words_of(_NAMES):
        plan = await plan_chat(service, call)
    if plan.new_reader is not None and body.shows_logprobs:
        raise UnsupportedError(
            f"include holds {LOGPROBS!r}; allowed only where the answer is text alone: without tools or reasoning",
            param="include",
        )
    return plan


class _Making:
    """Reads one answer, and tells of it in events."""

    def __init__(
        self,
        service: InferenceService,
        answer: ResponseAnswer,
        plan: ChatPlan,
        stream: ResultStream,
        *,
        on_end: Callable[[ResponseAnswer], None],
    ) -> None:
        self.on_end = on_end
        self._service = service
        self._answer = answer
        self._parts = AnswerParts(plan)
        self._stream = stream
        self._num_top = plan.params.logprobs

    async def events(self) -> EventSource:
        """All events; the answer is stored before its last ones are out. Ends the stream, however it ends itself."""
        answer = self._answer
        try:
            yield answer.begin()
            async for output in self._stream:
                if answer.is_unwanted:
                    break
                news = answer.start()
                if output.error is not None:
                    _log.warning("response %s ends with an error: %s", answer.id, output.error.code)
                    news += answer.fail(output.error)
                else:
                    news += await self._take(output)
                if answer.is_over:
                    self.on_end(answer)
                    news += answer.last_events()
                if news:
                    yield news
            if not answer.is_over:
                news = answer.cancel()
                self.on_end(answer)
                yield news + answer.last_events()
        except Exception as error:
            _log.error("a response failed", exc_info=error)
            news = answer.fail(as_servd_error(error))
            self.on_end(answer)
            yield news + answer.last_events()
        finally:
            await self._stream.aclose()

    async def _take(self, output: RequestOutput) -> list[bytes]:
        logprobs: list[dict[str, Any]] = []
        if self._num_top is not None:
            logprobs = chat_logprobs(self._service.engine.tokenizer, output.logprobs, self._num_top)["content"]
        news = self._answer.add(self._parts.read(output), logprobs)
        if output.finish_reason is not None:
            reasoning_tokens = await num_tokens(self._service, self._answer.reasonings)
            usage = usage_dict(
                output.num_prompt_tokens, output.num_cached_tokens, output.num_output_tokens, reasoning_tokens
            )
            news += self._answer.finish(output.finish_reason, usage)
        return news


def _head(
    service: InferenceService, body: ResponseRequest, params: SamplingParams, response_id: str
) -> dict[str, Any]:
    """What a response says of its request."""
    tools = [
        {"type": "function", "name": tool.name, "description": tool.description, "parameters": tool.parameters}
        | {"strict": tool.strict}
        for tool in body.call_tools()[0]
    ]
    text = body.text.format if body.text is not None else None
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": service.model_name,
        "background": bool(body.background),
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"} if text is None else text, "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _keep(request: web.Request, stored: StoredResponse, answer: ResponseAnswer) -> None:
    stored.complete(answer)
    if answer.failure is not None:
        return
    try:
        request.app[RESPONSES].add(request[CALLER].tenant, stored)
    except OverloadedError as error:  # the answer is there, and says that it is not kept
        _log.warning("response %s is not kept: %s", answer.id, error.message)
        answer.is_stored = False


def _json(stored: StoredResponse) -> web.Response:
    return web.Response(body=stored.as_json(), content_type="application/json")


def _find(request: web.Request) -> StoredResponse:
    return request.app[RESPONSES].get(request[CALLER].tenant, request.match_info["response_id"])


async def retrieve_response(request: web.Request) -> web.StreamResponse:
    """A response as it stands, or (of one made in the background) its events."""
    position = stream_position(request.query)
    stored = _find(request)
    if position is None:
        return _json(stored)
    if stored.run is None:
        raise InvalidRequestError(
            "stream is true; allowed for responses that were made with background: true", param="stream"
        )
    return await send_pieces(request, stored.run.events_after(position))


async def cancel_response(request: web.Request) -> web.Response:
    """End a response that is made in the background; one that is complete stays as it is."""
    stored = _find(request)
    if stored.run is None:
        raise InvalidRequestError(
            f"response {stored.id!r} was not made with background: true; allowed: one that was", param="response_id"
        )
    await stored.run.cancel()
    return _json(stored)


async def delete_response(request: web.Request) -> web.Response:
    """Forget a response; one that is being made is ended."""
    stored = request.app[RESPONSES].remove(request[CALLER].tenant, request.match_info["response_id"])
    if stored.run is not None:
        await stored.run.cancel()
    return json_reply({"id": stored.id, "object": "response", "deleted": True})


async def list_input_items(request: web.Request) -> web.Response:
    """What a response answered to: its own input, after what it went on from."""
    stored = _find(request)
    history = request.app[RESPONSES].history(request[CALLER].tenant, stored.previous_id)
    own: list[dict[str, Any]] = msgspec.json.decode(stored.input_items)
    return json_reply(item_page(request.query, [*history, *own]))


_ONE = Operation(
    "A kept response", reply=dict[str, Any], events=dict[str, Any], errors=(NotFoundError,), query=STREAM_QUERY
)
_CANCELLED = Operation("End a response", reply=dict[str, Any], errors=(NotFoundError,))
_INPUT = Operation("What it answered to", reply=dict[str, Any], errors=(NotFoundError,), query=PAGE_QUERY)
_DELETED = Operation("Forget a response", reply=DeletedResponse, errors=(NotFoundError,))

ROUTES = [
    Endpoint(
        "POST", "/v1/responses", create_response,
        Operation(
            "Answer, in OpenAI's Responses dialect", body=ResponseRequest, reply=dict[str, Any], events=dict[str, Any],
            errors=GENERATES,
        ),
    ),
    Endpoint(
        "POST", "/v1/responses/input_tokens", count_input_tokens,
        Operation("Count the tokens of a call", body=ResponseRequest, reply=ResponseInputTokens, errors=GENERATES),
    ),
    Endpoint("GET", "/v1/responses/{response_id}", retrieve_response, _ONE),
    Endpoint("DELETE", "/v1/responses/{response_id}", delete_response, _DELETED),
    Endpoint("POST", "/v1/responses/{response_id}/cancel", cancel_response, _CANCELLED),
    Endpoint("GET", "/v1/responses/{response_id}/input_items", list_input_items, _INPUT),
]  # fmt: skip
