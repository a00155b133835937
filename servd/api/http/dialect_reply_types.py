"""The shapes of what /v1/responses and /v1/messages reply, for /openapi.json, like `reply_types`.

Nothing is made of these at run time.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class InputTokens(msgspec.Struct):
    """How long a prompt is."""

    input_tokens: int


class ResponseInputTokens(msgspec.Struct):
    """How long the prompt of a response is."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedResponse(msgspec.Struct):
    """What was forgotten."""

    id: str
    object: Literal["response"]
    deleted: bool


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    """Words of the answer."""

    text: str


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    """A thought; the signature is empty."""

    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A tool that the answer wants used."""

    id: str
    name: str
    input: dict[str, Any]


class OutputTokensDetails(msgspec.Struct):
    """Of the answer's tokens, those of its thoughts."""

    thinking_tokens: int


class AnthropicUsage(msgspec.Struct):
    """Tokens of a message; those found in the prefix cache are not in input_tokens."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class AnthropicMessage(msgspec.Struct):
    """The reply of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: AnthropicUsage


class AnthropicError(msgspec.Struct):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class AnthropicErrorReply(msgspec.Struct):
    """The body of a reply that is not a success, in Anthropic's shape."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str | None | UnsetType = UNSET
