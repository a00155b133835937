"""POST /v1/completions: text or token ids in, text out, whole or as events.

Knows nothing of chat.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from servd.api.http.context import SERVER_CONFIG, SERVICE, system_fingerprint
from servd.api.http.decode import decode_body, read_body
from servd.api.http.generation import Answer, gather_answers, start_streams
from servd.api.http.openapi import GENERATES, Endpoint, Operation
from servd.api.http.replies import CompletionLogprobs, finish_reason_text, json_reply, vllm_prompt_logprobs
from servd.api.http.reply_types import Completion
from servd.api.http.schema import CompletionRequest, StreamOptions
from servd.api.http.schema.answer_format import answer_format
from servd.api.http.sse import stream_reply
from servd.api.service import InferenceService
from servd.engine.detokenizer import Detokenizer
from servd.errors import InvalidRequestError
from servd.outputs import RequestOutput, TokenLogprobs
from servd.sampling_params import SamplingParams

_DECODER = msgspec.json.Decoder(CompletionRequest)


async def create_completion(request: web.Request) -> web.StreamResponse:
    """Answer n times to each prompt; choice prompt * n + i is its i-th answer."""
    service = request.app[SERVICE]
    body = decode_body(await read_body(request), _DECODER)
    service.check_model(body.model)
    body.check()
    params = body.to_sampling_params(service.engine.tokenizer.vocab_size, service.engine.sampling_defaults)
    service.engine.check_room(params)
    if (form := answer_format(body)) is not None:
        await service.engine.check_guidance(params, param=form.param)
    prompts = body.prompts(request.app[SERVER_CONFIG].max_prompts)
    service.check_num_prompts(len(prompts))
    names = ["prompt"] if len(prompts) == 1 else [f"prompt[{i}]" for i in range(len(prompts))]
    token_ids = [
        await _encode(service, body, prompt, name)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    if body.truncate_prompt_tokens is not None:  # what is echoed is what the model read
        prompts = list(token_ids)
    echoed = await _echoed_texts(service, body, prompts, token_ids)
    choices = _Choices(service, body, params, prompts, token_ids, echoed)
    request_id = service.new_request_id("cmpl")
    streams = await start_streams(request, body, token_ids, params, request_id, names)
    head: dict[str, object] = {
        "id": request_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.model_name,
        "system_fingerprint": system_fingerprint(service),
    }
    if body.stream:
        return await stream_reply(
            request, head, body.stream_options or StreamOptions(), streams, params.n, choices.render_news
        )
    answers, usage = await gather_answers(streams, params.n)
    return json_reply(
        head | {"choices": [choices.whole(i, answer) for i, answer in enumerate(answers)], "usage": usage.as_dict()}
    )


async def _encode(
    service: InferenceService, body: CompletionRequest, prompt: str | list[int], name: str
) -> list[int]:
    """Token ids of a prompt; of those the last ones, if it is to be cut."""
    limit = service.engine.max_model_len
    kept = service.num_kept_tokens(body.truncate_prompt_tokens, body.max_answer_tokens)
    if not isinstance(prompt, str):
        if kept is not None:
            prompt = prompt[-kept:]
        if len(prompt) > limit:  # before millions of ids are looked at one by one
            raise InvalidRequestError(f"{name} has {len(prompt)} tokens; allowed: at most {limit - 1}", param=name)
    token_ids = await service.encode_prompt(prompt, add_special_tokens=body.add_special_tokens, param=name)
    return token_ids if kept is None else token_ids[-kept:]


async def _echoed_texts(
    service: InferenceService, body: CompletionRequest, prompts: list[str | list[int]], token_ids: list[list[int]]
) -> list[str]:
    """What each answer begins with: its prompt with `echo`, else nothing."""
    if not body.echo:
        return [""] * len(prompts)
    return [
        prompt
        if isinstance(prompt, str)
        else await service.detokenize(ids, skip_special_tokens=body.skip_special_tokens)
        for prompt, ids in zip(prompts, token_ids, strict=True)
    ]


class _Choices:
    """Makes `choices` entries of one call."""

    def __init__(
        self,
        service: InferenceService,
        body: CompletionRequest,
        params: SamplingParams,
        prompts: list[str | list[int]],
        token_ids: list[list[int]],
        echoed: list[str],
    ) -> None:
        self._tokenizer = service.engine.tokenizer
        self._body = body
        self._n = params.n
        self._prompts = token_ids
        self._echoed = echoed
        self._begun: set[int] = set()
        self._shared_prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}  # by prompt
        # A prompt of text is echoed as it was written, with its special tokens, without what the tokenizer put before.
        self._hides_first = [
            isinstance(prompt, str) and not prompt.startswith(self._tokenizer.token_text(ids[0]))
            and ids[0] in self._tokenizer.special_token_ids
            for prompt, ids in zip(prompts, token_ids, strict=True)
        ]  # fmt: skip
        self._logprobs = [
            CompletionLogprobs(
                self._tokenizer,
                body.logprobs or 0,
                Detokenizer(self._tokenizer, body.skip_special_tokens and not isinstance(prompt, str)),
                Detokenizer(self._tokenizer, body.skip_special_tokens, continues_text=True),
            )
            for prompt in prompts
            for _ in range(params.n)
        ]

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """The entry of a complete answer."""
        prompt = index // self._n
        prompt_logprobs = self._prompt_logprobs(index, answer.prompt_logprobs)
        choice = self._entry(index, "".join([self._echoed[prompt], *answer.texts]), answer.logprobs, prompt_logprobs)
        choice["finish_reason"] = finish_reason_text(answer.finish_reason)
        choice["stop_reason"] = answer.stop_reason
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = self._prompts[prompt]
            choice["token_ids"] = answer.token_ids
        self._add_prompt_logprobs(choice, prompt_logprobs)
        return choice

    def render_news(self, index: int, output: RequestOutput) -> list[bytes]:
        """The entry of a chunk; none if there is nothing to show yet."""
        text = output.text
        prompt_logprobs: list[TokenLogprobs | None] = []
        first = index not in self._begun
        if first:
            self._begun.add(index)
            text = self._echoed[index // self._n] + text
            prompt_logprobs = self._prompt_logprobs(index, output.prompt_logprobs)
        body = self._body
        shows_tokens = body.logprobs is not None or body.prompt_logprobs is not None or body.return_token_ids
        if not text and output.finish_reason is None and not (shows_tokens and (output.token_ids or first)):
            return []
        choice = self._entry(index, text, output.logprobs, prompt_logprobs)
        choice["finish_reason"] = finish_reason_text(output.finish_reason)
        if output.finish_reason is not None:
            choice["stop_reason"] = output.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = output.token_ids
            if first:
                choice["prompt_token_ids"] = self._prompts[index // self._n]
        if first:
            self._add_prompt_logprobs(choice, prompt_logprobs)
        return [msgspec.json.encode(choice)]

    def _add_prompt_logprobs(self, choice: dict[str, Any], entries: list[TokenLogprobs | None]) -> None:
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = vllm_prompt_logprobs(self._tokenizer, entries, self._body.prompt_logprobs)

    def _prompt_logprobs(
        self, index: int, entries: list[TokenLogprobs | None] | None
    ) -> list[TokenLogprobs | None]:
        """The prompt's, which the first answer has: the others share its computation."""
        prompt, answer = divmod(index, self._n)
        if answer == 0 and entries is not None:
            self._shared_prompt_logprobs[prompt] = entries
        return self._shared_prompt_logprobs.get(prompt, entries or [])

    def _entry(
        self,
        index: int,
        text: str,
        logprobs: list[TokenLogprobs],
        prompt_logprobs: list[TokenLogprobs | None],
    ) -> dict[str, Any]:
        shown: dict[str, Any] | None = None
        if self._body.logprobs is not None:
            prompt = index // self._n
            shown = self._logprobs[index].as_dict(
                prompt_logprobs if self._body.echo else [],
                logprobs,
                first_token_id=self._prompts[prompt][0],
                hides_first=self._hides_first[prompt],
            )
        return {"index": index, "text": text, "logprobs": shown}


ROUTES = [
    Endpoint(
        "POST", "/v1/completions", create_completion,
        Operation(
            "Go on with a text", body=CompletionRequest, reply=Completion, events=Completion, errors=GENERATES
        ),
    )
]  # fmt: skip
