"""Protobuf messages to servd's own values.

Checks only what the proto allows and servd does not; ranges are the service's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from google.protobuf import json_format

from servd.api.answer_format import grammar_of
from servd.api.chat.call import AnswerFormat, Tool, ToolChoice
from servd.api.conversation import check_num_messages, template_role
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.errors import InvalidRequestError, UnsupportedError
from servd.sampling_params import SamplingParams

MAX_SALT_CHARS = 256
MAX_TOOL_CALLS = 4096  # in all messages together

_OPTIONAL_FIELDS = tuple(
    field.name for field in pb.SamplingParams.DESCRIPTOR.fields
    if field.containing_oneof is not None and field.containing_oneof.name == f"_{field.name}"
)  # fmt: skip

_TOOL_MODES = {
    pb.ToolChoice.MODE_UNSPECIFIED: "auto",
    pb.ToolChoice.MODE_AUTO: "auto",
    pb.ToolChoice.MODE_NONE: "none",
    pb.ToolChoice.MODE_REQUIRED: "required",
}

ENGINE_STATES = {
    "starting": pb.ENGINE_STATE_STARTING,
    "ready": pb.ENGINE_STATE_READY,
    "recovering": pb.ENGINE_STATE_RECOVERING,
    "draining": pb.ENGINE_STATE_DRAINING,
    "dead": pb.ENGINE_STATE_DEAD,
}


def or_true(request: Any, field: str) -> bool:
    """The value of an optional bool whose default is true."""
    value: bool = getattr(request, field)
    return value if request.HasField(field) else True


def sampling_params_from(message: pb.SamplingParams, defaults: Mapping[str, float | None]) -> SamplingParams:
    """Sampling settings of a call; what the client did not set is taken from `defaults`, then from SamplingParams.

    `guidance` is left to `answer_format_from`. Raises UnsupportedError.
    """
    settings: dict[str, Any] = {**defaults}
    settings |= {name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)}
    if message.early_stopping:
        settings["early_stopping"] = message.early_stopping
    for name in settings.keys() - set(SamplingParams.__struct_fields__):
        raise UnsupportedError(f"{name} is set; servd does not honour it", param=f"sampling_params.{name}")
    if message.logit_bias:
        settings["logit_bias"] = dict(message.logit_bias)
    if message.allowed_token_ids:
        settings["allowed_token_ids"] = tuple(message.allowed_token_ids)
    return SamplingParams(
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        bad_words=tuple(message.bad_words),
        **settings,
    )


def answer_format_from(message: pb.SamplingParams) -> AnswerFormat | None:
    """What the answer's text must be, if anything. Raises InvalidRequestError."""
    match message.WhichOneof("guidance"):
        case "json_schema":
            param = "sampling_params.json_schema"
            return AnswerFormat("json_schema", json_object(message.json_schema, param), param)
        case "regex":
            return AnswerFormat("regex", message.regex, "sampling_params.regex")
        case "choice":
            return AnswerFormat("choice", list(message.choice.texts), "sampling_params.choice")
        case "grammar":
            return AnswerFormat("grammar", message.grammar, "sampling_params.grammar")
        case "json_object":
            if not message.json_object:
                raise InvalidRequestError(
                    "json_object is false; allowed: true, or not set", param="sampling_params.json_object"
                )
            return AnswerFormat("json_object", None, "sampling_params.json_object")
        case _:
            return None


def with_guidance(params: SamplingParams, message: pb.SamplingParams) -> SamplingParams:
    """The settings with the grammar that the message asks for. Raises InvalidRequestError."""
    answer_format = answer_format_from(message)
    if answer_format is None:
        return params
    return msgspec.structs.replace(params, guidance=grammar_of(answer_format))


def prompt_from(request: pb.GenerateRequest) -> tuple[str, str | list[int]]:
    """The name of the field that holds the prompt, and the prompt. Raises InvalidRequestError if none is set."""
    match request.WhichOneof("prompt"):
        case "text":
            return "text", request.text
        case "token_ids":
            return "token_ids", list(request.token_ids.ids)
        case _:
            raise InvalidRequestError("prompt is not set; set text or token_ids", param="prompt")


def salt_from(request: Any) -> str:
    """The request's cache_salt. Raises InvalidRequestError."""
    salt: str = request.cache_salt
    if len(salt) > MAX_SALT_CHARS:
        raise InvalidRequestError(
            f"cache_salt has {len(salt)} characters; allowed: at most {MAX_SALT_CHARS}", param="cache_salt"
        )
    return salt


def chat_messages_from(messages: Sequence[pb.ChatMessage], field: str) -> list[dict[str, Any]]:
    """The conversation as chat templates want it. Raises InvalidRequestError naming FIELD[i].…"""
    check_num_messages(len(messages))
    num_calls = sum(len(message.tool_calls) for message in messages)
    if num_calls > MAX_TOOL_CALLS:
        raise InvalidRequestError(
            f"{field} have {num_calls} tool calls; allowed: {MAX_TOOL_CALLS}", param=field
        )
    return [_template_message(message, f"{field}[{i}]") for i, message in enumerate(messages)]


def _template_message(message: pb.ChatMessage, where: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": template_role(message.role, where), "content": message.content}
    for field, name in (("name", "name"), ("tool_call_id", "tool_call_id"), ("reasoning", "reasoning_content")):
        if value := getattr(message, field):
            turn[name] = value
    if message.tool_calls:
        turn["tool_calls"] = [
            _template_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    return turn


def _template_tool_call(call: pb.ToolCall, where: str) -> dict[str, Any]:
    arguments = json_object(call.arguments, f"{where}.arguments")  # templates print them as an object
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def tools_from(request: pb.ChatRequest) -> tuple[Tool, ...]:
    """The functions that the model may call. Raises InvalidRequestError naming tools[i].parameters."""
    return tuple(
        Tool(
            tool.name,
            tool.description or None,
            json_object(tool.parameters, f"tools[{i}].parameters") if tool.parameters else None,
            tool.strict,
        )
        for i, tool in enumerate(request.tools)
    )


def tool_choice_from(message: pb.ToolChoice) -> ToolChoice:
    """Whether they are called. Raises InvalidRequestError naming tool_choice.FIELD."""
    mode = _TOOL_MODES.get(message.mode)
    if mode is None:
        raise InvalidRequestError(
            f"tool_choice.mode is {message.mode}; allowed: 0 to {max(_TOOL_MODES)}", param="tool_choice.mode"
        )
    if message.name and mode != "required":
        raise InvalidRequestError(
            "tool_choice.name is set; allowed: with mode MODE_REQUIRED", param="tool_choice.name"
        )
    return ToolChoice(mode, message.name or None, or_true(message, "parallel"))  # type: ignore[arg-type]


def template_kwargs_from(request: pb.ChatRequest) -> dict[str, Any]:
    """Extra variables of the chat template. Raises InvalidRequestError for what JSON does not know."""
    try:
        return json_format.MessageToDict(request.chat_template_kwargs)
    except (ValueError, json_format.Error):
        raise InvalidRequestError(
            "chat_template_kwargs holds a number that is not finite, or a value of no kind; allowed: JSON values",
            param="chat_template_kwargs",
        ) from None


def json_object(text: str, param: str) -> dict[str, Any]:
    """A JSON object given as text. Raises InvalidRequestError naming `param`."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequestError(f"{param} is not the text of a JSON object", param=param) from None
