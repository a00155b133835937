"""POST /v1/chat/completions: messages in, a message out, whole or as events.

Knows nothing of chat templates: the service renders them.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from servd.api.chat.call import ChatCall
from servd.api.chat.plan import plan_chat
from servd.api.http.context import SERVICE, system_fingerprint
from servd.api.http.decode import decode_body, read_body
from servd.api.http.generation import Answer, gather_answers, start_streams
from servd.api.http.messages import template_messages
from servd.api.http.openapi import GENERATES, Endpoint, Operation
from servd.api.http.replies import chat_logprobs, finish_reason_text, json_reply, vllm_prompt_logprobs
from servd.api.http.reply_types import ChatCompletion, ChatCompletionChunk
from servd.api.http.schema import ChatCompletionRequest, StreamOptions, renamed
from servd.api.http.sse import stream_reply
from servd.api.service import InferenceService
from servd.outputs import RequestOutput, TokenLogprobs

_DECODER = msgspec.json.Decoder(ChatCompletionRequest)
_PLAIN_DELTA = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """Answer n times to a conversation."""
    service = request.app[SERVICE]
    body = decode_body(await read_body(request), _DECODER)
    service.check_model(body.model)
    body.check()
    params = body.to_sampling_params(service.engine.tokenizer.vocab_size, service.engine.sampling_defaults)
    service.engine.check_room(params.n)
    plan = await plan_chat(
        service,
        ChatCall(
            template_messages(body.messages),
            params,
            add_generation_prompt=body.add_generation_prompt,
            template_kwargs=body.chat_template_kwargs,
        ),
    )
    token_ids, params = plan.prompt_token_ids, plan.params
    request_id = service.new_request_id("chatcmpl")
    with renamed("max_tokens", body.max_tokens_field):
        streams = await start_streams(request, body, [token_ids], params, request_id, ["messages"])
    choices = _Choices(service, body, token_ids)
    head: dict[str, object] = {
        "id": request_id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": service.model_name,
        "system_fingerprint": system_fingerprint(service),
    }
    if body.stream:
        return await stream_reply(
            request, head, body.stream_options or StreamOptions(), streams, params.n, choices.render_news
        )
    answers, usage = await gather_answers(streams, params.n)
    reply = head | {"choices": [choices.whole(i, answer) for i, answer in enumerate(answers)]}
    reply["usage"] = usage.as_dict()
    if body.return_token_ids:
        reply["prompt_token_ids"] = token_ids
    if body.prompt_logprobs is not None:
        reply["prompt_logprobs"] = vllm_prompt_logprobs(
            service.engine.tokenizer, answers[0].prompt_logprobs or [], body.prompt_logprobs
        )
    return json_reply(reply)


class _Choices:
    """Makes `choices` entries of one call."""

    def __init__(self, service: InferenceService, body: ChatCompletionRequest, prompt_token_ids: list[int]) -> None:
        self._tokenizer = service.engine.tokenizer
        self._body = body
        self._prompt_token_ids = prompt_token_ids
        self._begun: set[int] = set()
        self._shows_tokens = bool(body.logprobs or body.return_token_ids)

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """The entry of a complete answer."""
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(answer.texts), "refusal": None},
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": finish_reason_text(answer.finish_reason),
            "stop_reason": answer.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def render_news(self, index: int, output: RequestOutput) -> list[bytes]:
        """Entries of chunks: the role before anything else, then text, then the reason of the end."""
        entries = []
        if index not in self._begun:
            self._begun.add(index)
            entries.append(msgspec.json.encode(self._first(index)))
        if output.finish_reason is None and not self._shows_tokens:
            if output.text:  # the bulk of all chunks: nothing but the text is encoded
                entries.append(_PLAIN_DELTA % (index, msgspec.json.encode(output.text)))
            return entries
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": output.text} if output.text else {},
            "logprobs": self._logprobs(output.logprobs) if output.logprobs else None,
            "finish_reason": finish_reason_text(output.finish_reason),
        }
        if output.finish_reason is not None:
            choice["stop_reason"] = output.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = output.token_ids
        entries.append(msgspec.json.encode(choice))
        return entries

    def _first(self, index: int) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = self._prompt_token_ids
        return choice

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._tokenizer, entries, self._body.top_logprobs or 0)


ROUTES = [
    Endpoint(
        "POST", "/v1/chat/completions", create_chat_completion,
        Operation(
            "Answer a conversation",
            body=ChatCompletionRequest, reply=ChatCompletion, events=ChatCompletionChunk, errors=GENERATES,
        ),
    )
]  # fmt: skip
