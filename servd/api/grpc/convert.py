"""Protobuf messages to servd's own values and back.

Checks only what the proto allows and servd does not; ranges are the service's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from servd.api.conversation import check_num_messages, template_role
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.engine.tokenizer import Tokenizer
from servd.errors import InvalidRequestError
from servd.outputs import RequestOutput, TokenLogprobs
from servd.request import FinishReason
from servd.sampling_params import SamplingParams

_OPTIONAL_FIELDS = tuple(f.name for f in pb.SamplingParams.DESCRIPTOR.fields if f.has_presence)

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}

ENGINE_STATES = {
    "starting": pb.ENGINE_STATE_STARTING,
    "ready": pb.ENGINE_STATE_READY,
    "recovering": pb.ENGINE_STATE_RECOVERING,
    "draining": pb.ENGINE_STATE_DRAINING,
    "dead": pb.ENGINE_STATE_DEAD,
}


def sampling_params_from(message: pb.SamplingParams, defaults: Mapping[str, float | None]) -> SamplingParams:
    """Sampling settings of a call; what the client did not set is taken from `defaults`, then from SamplingParams."""
    settings: dict[str, Any] = {**defaults}
    settings |= {name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)}
    if message.logit_bias:
        settings["logit_bias"] = dict(message.logit_bias)
    return SamplingParams(stop=tuple(message.stop), stop_token_ids=tuple(message.stop_token_ids), **settings)


def prompt_from(request: pb.GenerateRequest) -> tuple[str, str | list[int]]:
    """The name of the field that holds the prompt, and the prompt. Raises InvalidRequestError if none is set."""
    match request.WhichOneof("prompt"):
        case "text":
            return "text", request.text
        case "token_ids":
            return "token_ids", list(request.token_ids.ids)
        case _:
            raise InvalidRequestError("prompt is not set; set text or token_ids", param="prompt")


def chat_messages_from(request: pb.ChatRequest) -> list[dict[str, Any]]:
    """The conversation as chat templates want it. Raises InvalidRequestError for an unknown role."""
    check_num_messages(len(request.messages))
    messages = []
    for i, message in enumerate(request.messages):
        turn = {"role": template_role(message.role, f"messages[{i}]"), "content": message.content}
        messages.append(turn | {"name": message.name} if message.name else turn)
    return messages


def template_kwargs_from(request: pb.ChatRequest) -> dict[str, Any]:
    """Extra variables of the chat template. Raises InvalidRequestError for what JSON does not know."""
    try:
        return json_format.MessageToDict(request.chat_template_kwargs)
    except (ValueError, json_format.Error):
        raise InvalidRequestError(
            "chat_template_kwargs holds a number that is not finite, or a value of no kind; allowed: JSON values",
            param="chat_template_kwargs",
        ) from None


def chunk_from(output: RequestOutput, request_id: str, model: str, tokenizer: Tokenizer) -> pb.Chunk:
    """One engine output as a message."""
    chunk = pb.Chunk(
        request_id=request_id,
        model=model,
        index=output.index,
        text=output.text,
        token_ids=output.token_ids,
        logprobs=[_logprobs_from(entry, tokenizer) for entry in output.logprobs],
        prompt_logprobs=[_logprobs_from(e, tokenizer) for e in output.prompt_logprobs or () if e is not None],
        finish_reason=_FINISH_REASONS[output.finish_reason],
    )
    if output.finish_reason is not None:
        chunk.usage.prompt_tokens = output.num_prompt_tokens
        chunk.usage.completion_tokens = output.num_output_tokens
        chunk.usage.cached_tokens = output.num_cached_tokens
    if isinstance(output.stop_reason, str):
        chunk.stop_text = output.stop_reason
    elif output.stop_reason is not None:
        chunk.stop_token_id = output.stop_reason
    return chunk


def _logprobs_from(entry: TokenLogprobs, tokenizer: Tokenizer) -> pb.TokenLogprobs:
    top = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
    return pb.TokenLogprobs(
        token_id=entry.token_id,
        token=tokenizer.token_text(entry.token_id),
        logprob=entry.logprob,
        rank=entry.rank,
        top_logprobs=[pb.TopLogprob(token_id=i, token=tokenizer.token_text(i), logprob=p) for i, p in top],
    )
