"""Protobuf messages to servd's own values.

Checks only what the proto allows and servd does not; ranges are the service's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from google.protobuf import json_format

from servd.api.chat.call import AnswerFormat, Tool, ToolChoice
from servd.api.chat.tools import check_json, format_text
from servd.api.conversation import MAX_TEMPLATE_VALUES, check_num_messages, check_template_names, template_role
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.errors import InvalidRequestError
from servd.sampling_params import SamplingParams

MAX_SALT_CHARS = 256
MAX_TOOL_CALLS = 4096  # in all messages together

_OPTIONAL_FIELDS = tuple(
    field.name for field in pb.SamplingParams.DESCRIPTOR.fields
    if field.containing_oneof is not None and field.containing_oneof.name == f"_{field.name}"
)  # fmt: skip

_EARLY_STOPPING: dict[int, bool | str] = {
    pb.EARLY_STOPPING_UNSPECIFIED: False,
    pb.EARLY_STOPPING_HEURISTIC: False,
    pb.EARLY_STOPPING_FIRST: True,
    pb.EARLY_STOPPING_NEVER: "never",
}

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


def sampling_params_from(
    message: pb.SamplingParams, defaults: Mapping[str, Any], *, max_tokens: int | None
) -> SamplingParams:
    """Sampling settings of a call; what the client did not set is taken from `defaults`, the model's own.

    A beam search does not sample: they are not for it. `guidance` is left to `answer_format_from`. Raises
    InvalidRequestError.
    """
    settings: dict[str, Any] = {"max_tokens": max_tokens, **({} if message.use_beam_search else defaults)}
    settings |= {name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)}
    if message.early_stopping not in _EARLY_STOPPING:
        raise InvalidRequestError(
            f"early_stopping is {message.early_stopping}; allowed: 0 to {max(_EARLY_STOPPING)}", param="early_stopping"
        )
    settings["early_stopping"] = _EARLY_STOPPING[message.early_stopping]
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


def with_guidance(params: SamplingParams, message: pb.SamplingParams) -> tuple[SamplingParams, str]:
    """The settings with the grammar that the message asks for, and the field that does. Raises InvalidRequestError."""
    answer_format = answer_format_from(message)
    if answer_format is None:
        return params, "sampling_params.guidance"
    return msgspec.structs.replace(params, guidance=format_text(answer_format)), answer_format.param


def prompt_from(
    message: Any, oneof: str, max_tokens: int, *, before: str = "", kept: int | None = None
) -> tuple[str, str | list[int]]:
    """The name of the field that holds a prompt, and the prompt: a text, or the last `kept` of its token ids.

    `before`: what the client's path to the oneof begins with. Raises InvalidRequestError if none is set, or for more
    than `max_tokens` ids: millions are not looked at one by one.
    """
    match message.WhichOneof(oneof):
        case "text":
            return f"{before}text", message.text
        case "token_ids":
            ids = message.token_ids.ids
            if kept is None and len(ids) > max_tokens:
                raise InvalidRequestError(
                    f"{before}token_ids has {len(ids)} tokens; allowed: at most {max_tokens - 1}",
                    param=f"{before}token_ids",
                )
            return f"{before}token_ids", list(ids if kept is None else ids[-kept:])
        case _:
            fields = ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name[oneof].fields)
            raise InvalidRequestError(
                f"{before}{oneof} is not set; allowed: one of {fields}", param=f"{before}{oneof}"
            )


def kept_tokens_from(request: Any) -> int | None:
    """How many tokens of the prompt are kept; -1: what leaves room for the answer. Raises InvalidRequestError."""
    if not request.HasField("truncate_prompt_tokens"):
        return None
    kept: int = request.truncate_prompt_tokens
    if kept != -1 and kept < 1:
        raise InvalidRequestError(
            f"truncate_prompt_tokens is {kept}; allowed: -1, or at least 1", param="truncate_prompt_tokens"
        )
    return kept


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
    """Extra variables of the chat template. Raises InvalidRequestError for what JSON does not know, or is too much."""
    try:
        variables = json_format.MessageToDict(request.chat_template_kwargs)
    except (ValueError, json_format.Error):
        raise InvalidRequestError(
            "chat_template_kwargs holds a number that is not finite, or a value of no kind; allowed: JSON values",
            param="chat_template_kwargs",
        ) from None
    check_json(variables, "chat_template_kwargs", MAX_TEMPLATE_VALUES)
    check_template_names(variables)
    return variables


def json_object(text: str, param: str) -> dict[str, Any]:
    """A JSON object given as text. Raises InvalidRequestError naming `param`."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequestError(f"{param} is not the text of a JSON object", param=param) from None
