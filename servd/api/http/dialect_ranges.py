"""What /v1/responses and /v1/messages take inside their lists, as JSON Schema; and their fields' ranges.

For readers of /openapi.json only, like `field_ranges`: the checks themselves are beside each dialect's types.
"""

from __future__ import annotations

from typing import Any

from servd.api.chat.plan import EFFORTS
from servd.api.chat.tools import MAX_TOOLS
from servd.api.conversation import MAX_MESSAGES
from servd.api.http.anthropic import schema as anthropic
from servd.api.http.responses import schema as responses
from servd.sampling_params import MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOP_STRINGS

Schema = dict[str, Any]
_MAX_INT = 1 << 31

_TEXT: Schema = {"type": "string"}
_ANY_OBJECT: Schema = {"type": "object"}
_FLAG: Schema = {"type": "boolean"}
_ANYTHING: Schema = {}


def _const(value: str) -> Schema:
    return {"const": value}


def _neutral(*values: Any) -> Schema:
    """Known, and refused unless it is one of these, or null."""
    return {"enum": [None, *values]}


def _any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _list(*items: Schema) -> Schema:
    return {"type": "array", "items": items[0] if len(items) == 1 else _any_of(*items)}


def _object(required: dict[str, Schema], optional: dict[str, Schema]) -> Schema:
    """An object with these fields alone; null is the same as nothing."""
    nullable = {name: schema if "enum" in schema or not schema else _any_of(schema, {"type": "null"})
                for name, schema in optional.items()}  # fmt: skip
    return {
        "type": "object",
        "properties": required | nullable,
        "required": list(required),
        "additionalProperties": False,
    }


# -- Responses ---------------------------------------------------------------------------------------------------------


def _item(kind: str, required: dict[str, Schema], optional: dict[str, Schema]) -> Schema:
    common = {"id": _TEXT, "status": _neutral("in_progress", "completed", "incomplete")}
    return _object({"type": _const(kind)} | required, common | optional)


def _part(kind: str, name: str = "text", **optional: Schema) -> Schema:
    return _object({"type": _const(kind), name: _TEXT}, optional)


def _message(*roles: str, parts: list[Schema]) -> Schema:
    content = _any_of(_TEXT, _list(*parts))
    message = _item("message", {"role": {"enum": list(roles)}, "content": content}, {"phase": _neutral()})
    message["required"].remove("type")  # what has no type is a message
    message["properties"]["type"] = {"enum": ["message", None]}
    return message


_OUTPUT_TEXT = _part("output_text", annotations=_ANYTHING, logprobs=_ANYTHING, parsed=_ANYTHING)
_DIRECT = _neutral({"type": "direct"})
_ITEMS = _any_of(
    _message("user", "system", "developer", parts=[_part("input_text")]),
    _message("assistant", parts=[_OUTPUT_TEXT, _part("refusal", "refusal")]),
    _item(
        "function_call",
        {"call_id": _TEXT, "name": _TEXT, "arguments": {"type": "string", "contentMediaType": "application/json"}},
        {"namespace": _neutral(), "async": _neutral(False), "caller": _DIRECT, "parsed_arguments": _ANYTHING},
    ),
    _item(
        "function_call_output",
        {"call_id": _TEXT, "output": _any_of(_TEXT, _list(_part("input_text")))},
        {"namespace": _neutral(), "caller": _DIRECT, "name": _ANYTHING},
    ),
    _item(
        "reasoning",
        {},
        {
            "summary": _list(_part("summary_text")),
            "content": _list(_part("reasoning_text")),
            "encrypted_content": _neutral(),
        },
    ),
)
_UNUSED_TOOL_FIELDS = {"allowed_callers": _neutral([], ["direct"]), "defer_loading": _neutral(False)}
_FUNCTION = _object(
    {"type": _const("function"), "name": _TEXT},
    {"description": _TEXT, "parameters": _ANY_OBJECT, "strict": _FLAG, "async": _neutral(False),
     "output_schema": _neutral()} | _UNUSED_TOOL_FIELDS,
)  # fmt: skip
_NAMED = _object({"type": _const("function"), "name": _TEXT}, {})
_MODE = {"enum": ["auto", "required"]}
_ALLOWED = _object({"type": _const("allowed_tools"), "mode": _MODE, "tools": _list(_NAMED)}, {})

# -- Messages ----------------------------------------------------------------------------------------------------------

_CACHE_CONTROL = _object({"type": _const("ephemeral")}, {"ttl": _neutral("5m", "1h")})


def _block(kind: str, required: dict[str, Schema], optional: dict[str, Schema]) -> Schema:
    return _object({"type": _const(kind)} | required, {"cache_control": _CACHE_CONTROL} | optional)


def _turn(role: str, *blocks: Schema) -> Schema:
    return _object({"role": _const(role), "content": _any_of(_TEXT, _list(*blocks))}, {})


_TEXT_BLOCK = _block("text", {"text": _TEXT}, {"citations": _neutral([])})
_TOOL_RESULT = _block(
    "tool_result",
    {"tool_use_id": _TEXT},
    {"content": _any_of(_TEXT, _list(_TEXT_BLOCK)), "is_error": _FLAG, "toolset_name": _neutral()},
)
_THINKING = _block("thinking", {"thinking": _TEXT}, {"signature": _TEXT})
_TOOL_USE = _block(
    "tool_use", {"id": _TEXT, "name": _TEXT, "input": _ANY_OBJECT}, {"caller": _DIRECT, "toolset_name": _neutral()}
)
_TOOL = _object(
    {"name": _TEXT, "input_schema": _ANY_OBJECT},
    {"type": _neutral("custom"), "description": _TEXT, "strict": _FLAG, "cache_control": _CACHE_CONTROL,
     "eager_input_streaming": _FLAG, "input_examples": _neutral([])} | _UNUSED_TOOL_FIELDS,
)  # fmt: skip
_PARALLEL = {"disable_parallel_tool_use": _FLAG}

DIALECT_RANGES: dict[type, dict[str, Schema]] = {
    responses.ResponseRequest: {
        "input": {"maxItems": MAX_MESSAGES, "items": _ITEMS},
        "tools": {"maxItems": MAX_TOOLS, "items": _FUNCTION},
        "tool_choice": {"pattern": "^(none|auto|required)$", "oneOf": [_NAMED, _ALLOWED]},
        "include": {"items": {"enum": list(responses.INCLUDES)}},
        "max_output_tokens": {"minimum": 0, "maximum": _MAX_INT},
        "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
        "max_tool_calls": {"minimum": 1, "maximum": _MAX_INT},
        "metadata": {
            "maxProperties": responses.MAX_METADATA,
            "propertyNames": {"minLength": 1, "maxLength": responses.MAX_METADATA_KEY},
            "additionalProperties": {"type": "string", "maxLength": responses.MAX_METADATA_VALUE},
        },
    },
    responses.TextConfig: {"verbosity": _neutral("medium")},
    responses.TextFormat: {"type": {"enum": ["text", "json_object", "json_schema"]}},
    responses.ReasoningConfig: {
        "effort": _neutral(*EFFORTS),
        **{name: _neutral("auto") for name in ("summary", "generate_summary", "context")},
        "mode": _neutral("standard"),
    },
    responses.ResponseStreamOptions: {"include_obfuscation": {"enum": [False]}},
    anthropic.Conversation: {
        "messages": {
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": _any_of(
                _turn("user", _TEXT_BLOCK, _TOOL_RESULT),
                _turn("assistant", _TEXT_BLOCK, _THINKING, _TOOL_USE),
                _turn("system", _TEXT_BLOCK),
            ),
        },
        "system": {"items": _TEXT_BLOCK},
        "tools": {"maxItems": MAX_TOOLS, "items": _TOOL},
        "tool_choice": {
            "oneOf": [
                _object({"type": {"enum": ["auto", "any", "none"]}}, _PARALLEL),
                _object({"type": _const("tool"), "name": _TEXT}, _PARALLEL),
            ]
        },
        "cache_control": {"oneOf": [_CACHE_CONTROL]},
    },
    anthropic.MessagesRequest: {
        "max_tokens": {"minimum": 1, "maximum": _MAX_INT},
        "stop_sequences": {
            "maxItems": MAX_STOP_STRINGS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
        },
    },
    anthropic.OutputConfig: {"effort": _neutral(*EFFORTS)},
    anthropic.OutputFormat: {"type": {"enum": ["json_schema"]}},
    anthropic.Thinking: {"type": {"enum": ["enabled", "disabled", "adaptive"]}, "display": _neutral("summarized")},
}
"""Type → field → keywords, for `field_ranges.FIELD_RANGES`, which adds the fields that all dialects share."""
