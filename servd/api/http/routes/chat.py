"""POST /v1/chat/completions: messages in, a message out, whole or as events.

Knows nothing of chat templates or of how models write tool calls: the plan does.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from servd.api.chat.parts import Message, ReasoningPart, TextPart, ToolCallPart
from servd.api.chat.plan import ChatPlan, plan_chat
from servd.api.http.answer_parts import AnswerParts
from servd.api.http.context import SERVICE, system_fingerprint
from servd.api.http.decode import decode_body, read_body
from servd.api.http.generation import Answer, gather_answers, start_streams
from servd.api.http.openapi import GENERATES, Endpoint, Operation
from servd.api.http.replies import chat_logprobs, finish_reason_text, json_reply, vllm_prompt_logprobs
from servd.api.http.reply_types import ChatCompletion, ChatCompletionChunk
from servd.api.http.schema import ChatCompletionRequest, StreamOptions, renamed
from servd.api.http.sse import stream_reply
from servd.api.service import InferenceService
from servd.outputs import RequestOutput, TokenLogprobs
from servd.request import FinishReason

_DECODER = msgspec.json.Decoder(ChatCompletionRequest)
_PLAIN_DELTA = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """Answer n times to a conversation."""
    service = request.app[SERVICE]
    body = decode_body(await read_body(request), _DECODER)
    service.check_model(body.model)
    body.check()
    params = body.to_sampling_params(service.engine.tokenizer.vocab_size, service.engine.sampling_defaults)
    call = body.to_call(params)
    service.engine.check_room(params)
    plan = await plan_chat(service, call)
    request_id = service.new_request_id("chatcmpl")
    with renamed("max_tokens", body.max_tokens_field), renamed("guidance", plan.guidance_param):
        streams = await start_streams(request, body, [plan.prompt_token_ids], plan.params, request_id, ["messages"])
    final = call.messages[-1]
    choices = _Choices(service, body, plan, final["content"] if body.echo and final["role"] == "assistant" else "")
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
        reply["prompt_token_ids"] = plan.prompt_token_ids
    if body.prompt_logprobs is not None:
        reply["prompt_logprobs"] = choices.prompt_logprobs(answers[0].prompt_logprobs or [])
    return json_reply(reply)


class _Choices:
    """Makes `choices` entries of one call."""

    def __init__(self, service: InferenceService, body: ChatCompletionRequest, plan: ChatPlan, echoed: str) -> None:
        """`echoed`: what the replies begin with."""
        self._tokenizer = service.engine.tokenizer
        self._body = body
        self._plan = plan
        self._echoed = echoed
        self._begun: set[int] = set()
        self._readers: dict[int, AnswerParts] = {}
        self._has_calls: set[int] = set()
        self._shows_tokens = bool(body.logprobs or body.return_token_ids or body.prompt_logprobs is not None)

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """The entry of a complete answer."""
        choice = {
            "index": index,
            "message": self._message(index, "".join(answer.texts)),
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": self._finish_reason(index, answer.finish_reason),
            "stop_reason": answer.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def _message(self, index: int, text: str) -> dict[str, Any]:
        if self._plan.new_reader is None:
            return {"role": "assistant", "content": self._echoed + text, "refusal": None}
        reader = self._plan.new_reader()
        read = Message()
        read.add(reader.push(text))
        read.add(reader.finish())
        content = self._echoed + read.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if read.reasoning is not None and self._body.include_reasoning:
            message |= {"reasoning_content": read.reasoning, "reasoning": read.reasoning}
        if read.tool_calls:
            self._has_calls.add(index)
            message["content"] = content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in read.tool_calls
            ]
        return message

    def render_news(self, index: int, output: RequestOutput) -> list[bytes]:
        """Entries of chunks: the role before anything else, then text, then the reason of the end."""
        entries = []
        if index not in self._begun:
            self._begun.add(index)
            entries += [msgspec.json.encode(choice) for choice in self._first(index)]
        if self._plan.new_reader is not None:
            return entries + self._read_news(index, output)
        if output.finish_reason is None and not self._shows_tokens:
            if output.text:  # the bulk of all chunks: nothing but the text is encoded
                entries.append(_PLAIN_DELTA % (index, msgspec.json.encode(output.text)))
            return entries
        delta = {"content": output.text} if output.text else {}
        entries.append(msgspec.json.encode(_choice(index, delta) | self._details(index, output)))
        return entries

    def _read_news(self, index: int, output: RequestOutput) -> list[bytes]:
        """One entry a part, and one for what belongs to no part."""
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = AnswerParts(self._plan)
        entries = []
        for part in reader.read(output):
            if isinstance(part, TextPart):
                entries.append(_PLAIN_DELTA % (index, msgspec.json.encode(part.text)))
            elif delta := self._delta(index, part):
                entries.append(msgspec.json.encode(_choice(index, delta)))
        if output.finish_reason is not None or self._shows_tokens:
            entries.append(msgspec.json.encode(_choice(index, {}) | self._details(index, output)))
        return entries

    def _delta(self, index: int, part: ReasoningPart | ToolCallPart) -> dict[str, Any]:
        if isinstance(part, ReasoningPart):
            return {"reasoning_content": part.text, "reasoning": part.text} if self._body.include_reasoning else {}
        self._has_calls.add(index)
        if part.id is None:
            return {"tool_calls": [{"index": part.index, "function": {"arguments": part.arguments}}]}
        function = {"name": part.name, "arguments": part.arguments}
        return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}

    def _details(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """What is told of an output's tokens, and of its end."""
        details: dict[str, Any] = {
            "logprobs": self._logprobs(output.logprobs) if output.logprobs else None,
            "finish_reason": self._finish_reason(index, output.finish_reason),
        }
        if output.finish_reason is not None:
            details["stop_reason"] = output.stop_reason
        if self._body.return_token_ids:
            details["token_ids"] = output.token_ids
        if output.prompt_logprobs is not None and self._body.prompt_logprobs is not None:
            details["prompt_logprobs"] = self.prompt_logprobs(output.prompt_logprobs)
        return details

    def _finish_reason(self, index: int, reason: FinishReason | None) -> str | None:
        if reason is FinishReason.STOP and index in self._has_calls:
            return "tool_calls"
        return finish_reason_text(reason)

    def _first(self, index: int) -> list[dict[str, Any]]:
        first = _choice(index, {"role": "assistant", "content": ""})
        if self._body.return_token_ids:
            first["prompt_token_ids"] = self._plan.prompt_token_ids
        return [first, _choice(index, {"content": self._echoed})] if self._echoed else [first]

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._tokenizer, entries, self._body.top_logprobs or 0)

    def prompt_logprobs(self, entries: list[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """The prompt's, in vLLM's shape."""
        return vllm_prompt_logprobs(self._tokenizer, entries, self._body.prompt_logprobs or 0)


def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


ROUTES = [
    Endpoint(
        "POST", "/v1/chat/completions", create_chat_completion,
        Operation(
            "Answer a conversation",
            body=ChatCompletionRequest, reply=ChatCompletion, events=ChatCompletionChunk, errors=GENERATES,
        ),
    )
]  # fmt: skip
