"""Pieces of grammars in llguidance's Lark dialect that several formats share.

Knows nothing of formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from servd.api.chat.call import Tool
from servd.engine.guidance import JSON_STYLE
from servd.engine.json_schema import ANNOTATIONS, NAMED_SCHEMAS, ONE_SCHEMA, OWN_KEYWORD, SOME_SCHEMAS

# Keywords by which an object may have properties that are not listed beside them.
_OPENS = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def literal(text: str) -> str:
    """The term that stands for `text`."""
    return json.dumps(text)


def json_term(schema: Mapping[str, Any], *, is_strict: bool) -> str:
    """The term of JSON texts under `schema`. Not strict: keywords that cannot be enforced are left out."""
    style = JSON_STYLE if is_strict else {**JSON_STYLE, "lenient": True}
    return "%json " + json.dumps({**_bare(schema), OWN_KEYWORD: style})


def _bare(schema: Any) -> Any:
    """A schema without its descriptions, which can be most of its text."""
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in NAMED_SCHEMAS and isinstance(value, dict):
            kept[keyword] = {name: _bare(each) for name, each in value.items()}
        elif keyword in SOME_SCHEMAS and isinstance(value, list):
            kept[keyword] = [_bare(each) for each in value]
        elif keyword in ONE_SCHEMA or keyword == "items":
            kept[keyword] = _bare(value)
        elif keyword not in ANNOTATIONS or keyword == "$id":
            kept[keyword] = value
    return kept


def arguments_term(tool: Tool) -> str:
    """The term of a tool's arguments as a JSON object, without any that its schema does not name."""
    schema = tool.parameters or NO_ARGUMENTS
    if "properties" in schema and not schema.keys() & _OPENS:
        schema = {**schema, "additionalProperties": False}
    return json_term(schema, is_strict=tool.strict)


def json_call_rules(tools: Sequence[Tool], arguments_key: str) -> str:
    """The rule `call`: {"name": NAME, ARGUMENTS_KEY: {…}} of any of the tools."""
    lines = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        head = literal(f'{{"name": {json.dumps(tool.name)}, "{arguments_key}": ')
        lines += [f"call_{i}: {head} arguments_{i} {literal('}')}", f"arguments_{i}: {arguments_term(tool)}"]
    return "\n".join(lines)
