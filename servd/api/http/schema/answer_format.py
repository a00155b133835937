"""The fields that say what form an answer's text must have, OpenAI's and vLLM's, and the one format they become.

Knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from servd.api.chat.call import AnswerFormat
from servd.api.chat.tools import check_json
from servd.api.http.schema.checks import check_count, shown
from servd.errors import InvalidRequestError

MAX_SCHEMA_VALUES = 50_000  # numbers, texts, lists and objects in a JSON schema
MAX_CHOICES = 4096


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`response_format.json_schema`. Answers follow the schema whether `strict` is set or not."""

    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`response_format`: of type text, json_object or json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: one of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class FormatFields(Protocol):
    """The fields of a body; at most one of them may ask for a format."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: dict[str, Any] | str | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None


def answer_format(fields: FormatFields) -> AnswerFormat | None:
    """The format that is asked for, if one is. Raises InvalidRequestError naming the field."""
    found = list(_formats(fields))
    if len(found) > 1:
        raise InvalidRequestError(
            f"{found[1].param} is set beside {found[0].param}; allowed: one form of the answer", param=found[1].param
        )
    return found[0] if found else None


def _formats(fields: FormatFields) -> Iterator[AnswerFormat]:
    if fields.response_format is not None:
        yield from _response_format(fields.response_format)
    structured = fields.structured_outputs or StructuredOutputs()
    for json, param in ((structured.json, "structured_outputs.json"), (fields.guided_json, "guided_json")):
        if json is not None:
            yield AnswerFormat("json_schema", _schema(json, param), param)
    for regex, param in ((structured.regex, "structured_outputs.regex"), (fields.guided_regex, "guided_regex")):
        if regex is not None:
            yield AnswerFormat("regex", regex, param)
    for choice, param in ((structured.choice, "structured_outputs.choice"), (fields.guided_choice, "guided_choice")):
        if choice is not None:
            if not choice:
                raise InvalidRequestError(f"{param} is empty; allowed: at least one text", param=param)
            check_count(param, choice, MAX_CHOICES)
            yield AnswerFormat("choice", choice, param)
    for grammar, param in (
        (structured.grammar, "structured_outputs.grammar"), (fields.guided_grammar, "guided_grammar")
    ):  # fmt: skip
        if grammar is not None:
            yield AnswerFormat("grammar", grammar, param)
    if structured.json_object:
        yield AnswerFormat("json_object", None, "structured_outputs.json_object")


def _response_format(wanted: ResponseFormat) -> Iterator[AnswerFormat]:
    if (wanted.json_schema is not None) != (wanted.type == "json_schema"):
        raise InvalidRequestError(
            f"response_format is of type {wanted.type[:100]!r} {'with' if wanted.json_schema else 'without'} "
            "json_schema; allowed: json_schema with type 'json_schema', and only there",
            param="response_format.json_schema",
        )
    match wanted.type:
        case "text":
            return
        case "json_object":
            yield AnswerFormat("json_object")
        case "json_schema":
            assert wanted.json_schema is not None
            schema = wanted.json_schema.schema
            if schema is None:
                yield AnswerFormat("json_object")
            else:
                yield AnswerFormat("json_schema", _schema(schema, "response_format.json_schema.schema"))
        case _:
            raise InvalidRequestError(
                f"response_format.type is {shown(wanted.type)}; allowed: text, json_object, json_schema",
                param="response_format.type",
            )


def _schema(schema: dict[str, Any] | str, param: str) -> dict[str, Any]:
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            raise InvalidRequestError(f"{param} is not the text of a JSON object", param=param) from None
    check_json(schema, param, MAX_SCHEMA_VALUES)
    return schema
