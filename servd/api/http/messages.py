"""The messages of a chat request: roles, content and the extras that chat templates can use.

Knows nothing of templates or tokens.
"""

from __future__ import annotations

from typing import Any

import msgspec

from servd.api.conversation import check_num_messages, template_role
from servd.errors import InvalidRequestError, UnsupportedError

MAX_PARTS = 4096  # of content, and tool calls, in all messages together


class FunctionCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The function that an earlier answer wanted called; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool call in an earlier answer."""

    id: str
    function: FunctionCall
    type: str = "function"
    index: int | None = None  # left over from streamed deltas; no effect


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message as clients send it; also what clients send back of our own answers."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # its newer name
    audio: Any = None
    function_call: Any = None
    annotations: Any = None


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates take them: content is always a string.

    Raises InvalidRequestError naming messages[i].FIELD.
    """
    check_num_messages(len(messages))
    num_parts = sum(len(m.content) if isinstance(m.content, list) else 0 for m in messages)
    num_parts += sum(len(m.tool_calls or ()) for m in messages)
    if num_parts > MAX_PARTS:
        raise InvalidRequestError(
            f"messages have {num_parts} content parts and tool calls; allowed: {MAX_PARTS}", param="messages"
        )
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: ChatMessage, where: str) -> dict[str, Any]:
    role = template_role(message.role, where)
    for field in ("audio", "function_call", "annotations"):
        if getattr(message, field):
            raise UnsupportedError(f"{where}.{field} is set; servd does not honour it", param=f"{where}.{field}")
    rendered: dict[str, Any] = {
        "role": role,
        "content": _text_content(message, where),
    }
    for field in ("name", "tool_call_id", "refusal", "reasoning_content"):
        if (value := getattr(message, field)) is not None:
            rendered[field] = value
    if message.reasoning is not None and message.reasoning_content is None:
        rendered["reasoning_content"] = message.reasoning  # as templates know it
    if message.tool_calls:
        rendered["tool_calls"] = [
            _template_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    return rendered


def _text_content(message: ChatMessage, where: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role != "assistant":
            raise InvalidRequestError(
                f"{where}.content is null; allowed for role {message.role}: a string, or parts of type text",
                param=f"{where}.content",
            )
        return ""
    return "\n".join(_text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _text_part(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind != "text":
        error = UnsupportedError if kind in ("image_url", "input_audio", "file", "video_url") else InvalidRequestError
        shown = "missing" if kind is None else repr(kind)[:100]
        raise error(f"{where}.type is {shown}; allowed: 'text'", param=f"{where}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{where}.text is missing or not a string", param=f"{where}.text")
    for key in part:
        if key not in ("type", "text"):
            raise UnsupportedError(f"{where}.{key[:100]} is not honoured", param=f"{where}.{key[:100]}")
    return text


def _template_tool_call(call: ToolCall, where: str) -> dict[str, Any]:
    if call.type != "function":
        raise UnsupportedError(f"{where}.type is {call.type[:100]!r}; allowed: 'function'", param=f"{where}.type")
    try:  # templates print the arguments as an object
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequestError(
            f"{where}.function.arguments is not the text of a JSON object", param=f"{where}.function.arguments"
        ) from None
    return {
        "id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}
    }  # fmt: skip
