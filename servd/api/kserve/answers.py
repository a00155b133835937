"""Runs a call on the service and turns the engine's news into output tensors, whole or piece by piece.

Knows nothing of transports.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from servd.api.kserve.call import InferCall
from servd.api.kserve.model import OUTPUTS, TEXT_INPUT
from servd.api.kserve.tensors import Tensor
from servd.api.service import InferenceService
from servd.engine.tokenizer import Tokenizer
from servd.outputs import RequestOutput, TokenLogprobs
from servd.request import FinishReason

LEAST_LOGPROB = -9999.0  # JSON has no -inf


@dataclass(frozen=True, slots=True)
class InferReply:
    """Output tensors; `is_final`: nothing follows."""

    outputs: list[Tensor]
    is_final: bool


async def replies_to(
    service: InferenceService, call: InferCall, deadline: float | None
) -> AsyncGenerator[InferReply, None]:
    """The replies to a call: many if it streams, else one. To be closed; what is unfinished is then aborted.

    `deadline`: seconds that the transport leaves, None for no limit. Raises what the service raises, also in
    mid-stream.
    """
    await service.engine.check_guidance(call.params, param=call.guidance_param)
    token_ids = await service.encode_prompt(call.text, param=TEXT_INPUT)
    if call.kept_tokens is not None:
        token_ids = token_ids[-call.kept_tokens :]
    limits = [seconds for seconds in (call.timeout, deadline) if seconds is not None]
    stream = service.generate(
        token_ids, call.params, request_id=service.new_request_id("infer"), priority=call.priority,
        timeout=min(limits, default=None), cache_salt=call.cache_salt, prompt_param=TEXT_INPUT,
    )  # fmt: skip
    tensors = _Tensors(call, service.engine.tokenizer)
    async with aclosing(stream):
        answers = [_News() for _ in range(call.params.n)]
        unfinished = call.params.n
        async for output in stream:
            if output.error is not None:
                raise output.error
            answers[output.index].add(output)
            unfinished -= output.finish_reason is not None
            if call.streams or unfinished == 0:
                yield InferReply(tensors.of(answers), is_final=unfinished == 0)
                answers = [_News() for _ in range(call.params.n)]


async def whole_reply(service: InferenceService, call: InferCall, deadline: float | None) -> InferReply:
    """The one reply to a call that does not stream. Raises what the service raises."""
    async with aclosing(replies_to(service, call, deadline)) as replies:
        return await anext(replies)


@dataclass(slots=True)
class _News:
    """What is new of one answer."""

    texts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0

    def add(self, output: RequestOutput) -> None:
        self.texts.append(output.text)
        self.num_tokens += len(output.token_ids)
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason
        self.num_prompt_tokens = output.num_prompt_tokens


class _Tensors:
    """Makes the tensors of one call's replies; adds up what is cumulative."""

    def __init__(self, call: InferCall, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._cumulative = [0.0] * call.params.n

    def of(self, news: Sequence[_News]) -> list[Tensor]:
        """The outputs asked for; the first dimension of most is the answer."""
        for i, one in enumerate(news):
            self._cumulative[i] += sum(entry.logprob for entry in one.logprobs)
        tensors = []
        for name in self._call.outputs:
            values = [self._value(name, i, one) for i, one in enumerate(news)]
            if name == "num_input_tokens":
                values = [max(values)]
            tensors.append(Tensor(name, OUTPUTS[name].datatype, (len(values),), values))
        return tensors

    def _value(self, name: str, index: int, news: _News) -> Any:
        match name:
            case "text_output":
                before = self._call.text if self._call.repeats_input else ""
                return (before + "".join(news.texts)).encode()
            case "finish_reason":  # Triton's vLLM backend writes "None" while an answer goes on
                return str(None if news.finish_reason is None else news.finish_reason.value).encode()
            case "cumulative_logprob":
                return self._cumulative[index]
            case "logprobs":
                return msgspec.json.encode([self._entry(entry) for entry in news.logprobs])
            case "num_input_tokens":
                return news.num_prompt_tokens
            case _:
                return news.num_tokens

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        """vLLM's shape: {token id: {logprob, rank, decoded_token}}."""
        ranked = [
            (token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs, strict=True), 1)
        ]
        return {
            str(i): {
                "logprob": logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB,
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(i),
            }
            for i, logprob, rank in [(entry.token_id, entry.logprob, entry.rank), *ranked]
        }
