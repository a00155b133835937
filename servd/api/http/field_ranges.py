"""What the fields of request bodies are checked for after they are parsed, as JSON Schema keywords beside the types.

For readers of /openapi.json only: the checks themselves are in the types' own methods and in SamplingParams.
"""

from __future__ import annotations

from typing import Any

from servd.api.chat.tools import MAX_TOOLS
from servd.api.conversation import ROLES
from servd.api.http.anthropic.schema import MessagesRequest
from servd.api.http.dialect_ranges import DIALECT_RANGES
from servd.api.http.messages import ChatMessage
from servd.api.http.responses.schema import ResponseRequest
from servd.api.http.schema import ChatCompletionRequest, CompletionRequest, GenerationRequest
from servd.api.http.schema.generation import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_DEADLINE_MS,
    MAX_PRIORITY,
    MAX_SALT_CHARS,
)
from servd.sampling_params import (
    MAX_BAD_WORD_CHARS,
    MAX_LENGTH_PENALTY,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

_MAX_INT = 1 << 31


def between(low: float, high: float) -> dict[str, Any]:
    """A number from `low` to `high`, both allowed."""
    return {"minimum": low, "maximum": high}


def above(low: float, high: float) -> dict[str, Any]:
    """A number above `low`, up to `high`."""
    return {"exclusiveMinimum": low, "maximum": high}


def length(low: int, high: int) -> dict[str, Any]:
    """A string of so many characters."""
    return {"minLength": low, "maxLength": high}


_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
TOKEN_ID = {"type": "integer", "minimum": 0}

_GENERATION: dict[str, dict[str, Any]] = {
    "n": between(1, MAX_N),
    "max_tokens": between(0, _MAX_INT),
    "min_tokens": between(0, _MAX_INT),
    "temperature": between(0, 100),
    "top_p": above(0, 1),
    "top_k": between(-1, _MAX_INT),
    "min_p": between(0, 1),
    "presence_penalty": between(-2, 2),
    "frequency_penalty": between(-2, 2),
    "repetition_penalty": above(0, 100),
    "seed": between(-(1 << 63), (1 << 63) - 1),
    "prompt_logprobs": between(0, MAX_LOGPROBS),
    "stop": length(1, MAX_STOP_CHARS)
    | {"maxItems": MAX_STOP_STRINGS, "items": {"type": "string"} | length(1, MAX_STOP_CHARS)},
    "stop_token_ids": {"maxItems": MAX_STOP_TOKEN_IDS, "items": TOKEN_ID},
    "logit_bias": {
        "maxProperties": MAX_LOGIT_BIASES,
        "propertyNames": {"pattern": "^[0-9]{1,20}$"},
        "additionalProperties": {"type": "number"} | between(-100, 100),
    },
    "priority": between(-MAX_PRIORITY, MAX_PRIORITY),
    "cache_salt": length(1, MAX_SALT_CHARS),
    "deadline_ms": between(1, MAX_DEADLINE_MS),
    "best_of": between(1, MAX_N),
    "length_penalty": between(-MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY),
    "allowed_token_ids": {"minItems": 1, "maxItems": MAX_ALLOWED_TOKEN_IDS, "items": TOKEN_ID},
    "bad_words": {"maxItems": MAX_BAD_WORDS, "items": {"type": "string"} | length(1, MAX_BAD_WORD_CHARS)},
    "truncate_prompt_tokens": between(-1, _MAX_INT),
}


def _shared_by(dialect: type) -> dict[str, dict[str, Any]]:
    """The ranges of the fields that a dialect has in common with completions."""
    fields: tuple[str, ...] = dialect.__struct_fields__  # type: ignore[attr-defined]  # a msgspec struct
    return {name: ranges for name, ranges in _GENERATION.items() if name in fields}


FIELD_RANGES: dict[type, dict[str, dict[str, Any]]] = {
    GenerationRequest: _GENERATION,
    CompletionRequest: {"logprobs": between(0, MAX_LOGPROBS), "prompt": {"minLength": 1, "minItems": 1}},
    ChatCompletionRequest: {
        "max_completion_tokens": between(0, _MAX_INT),
        "top_logprobs": between(0, MAX_LOGPROBS),
        "messages": {"minItems": 1},
        "tools": {"maxItems": MAX_TOOLS},
    },
    ChatMessage: {
        "role": {"enum": list(ROLES)},
        "content": {"items": _TEXT_PART},
        **{name: {"enum": [None]} for name in ("audio", "function_call")},
    },
    **DIALECT_RANGES,
    ResponseRequest: _shared_by(ResponseRequest) | DIALECT_RANGES[ResponseRequest],
    MessagesRequest: _shared_by(MessagesRequest) | DIALECT_RANGES[MessagesRequest],
}
"""Type → field → keywords; those of a base hold for its subclasses too."""
