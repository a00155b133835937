"""Which keywords of a JSON schema are honoured: all others are refused by name, wherever in the schema they stand.

Owns the lists of keywords. Values and references are judged by the grammar library; knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from servd.errors import InvalidRequestError, UnsupportedError
from servd.grammar import MAX_CHOICES

ONE_SCHEMA = frozenset(("additionalProperties", "additionalItems"))
SOME_SCHEMAS = frozenset(("anyOf", "oneOf", "allOf", "prefixItems"))
NAMED_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions"))
ASSERTIONS = frozenset(
    (
        "$ref", "const", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "items", "maxItems", "maxLength",
        "maxProperties", "maximum", "minItems", "minLength", "minProperties", "minimum", "multipleOf", "pattern",
        "required", "type",
    )
)  # fmt: skip
# They say nothing of which values are valid (JSON Schema 2020-12, 7.7.1 and 8; OpenAPI 3.1, 4.8.24).
ANNOTATIONS = frozenset(
    (
        "$anchor", "$comment", "$id", "$schema", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema",
        "default", "deprecated", "description", "discriminator", "example", "examples", "externalDocs", "readOnly",
        "title", "writeOnly", "xml",
    )
)  # fmt: skip
KNOWN = ONE_SCHEMA | SOME_SCHEMAS | NAMED_SCHEMAS | ASSERTIONS | ANNOTATIONS
OWN_KEYWORD = "x-guidance"  # the grammar library's settings: the front's to give
MAX_DEPTH = 64
MAX_INTEGER = (1 << 53) - 1
LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")


def bound_integers(schema: dict[str, Any]) -> None:
    """Give integers without limits those that every JSON reader holds exactly (RFC 7493, 2.2), in place.

    A model that has begun a number may go on with digits for ever; so it ends, and is valid all the same. What is
    malformed is left for the check.
    """
    pending: list[object] = [schema]
    while pending:
        found = pending.pop()
        if not isinstance(found, dict):
            continue
        kinds = found.get("type")
        if kinds == "integer" or (isinstance(kinds, list) and "integer" in kinds and "number" not in kinds):
            _bound(found)
        for keyword, value in found.items():
            if keyword in ONE_SCHEMA or keyword == "items":
                pending += value if isinstance(value, list) else [value]
            elif keyword in SOME_SCHEMAS and isinstance(value, list):
                pending += value
            elif keyword in NAMED_SCHEMAS and isinstance(value, dict):
                pending += value.values()


def _bound(schema: dict[str, Any]) -> None:
    if {"enum", "const", "multipleOf"} & schema.keys():
        return
    given = [schema[name] for name in LIMITS if name in schema]
    if all(isinstance(limit, (int, float)) and abs(limit) < MAX_INTEGER for limit in given):
        if "exclusiveMinimum" not in schema:
            schema.setdefault("minimum", -MAX_INTEGER)
        if "exclusiveMaximum" not in schema:
            schema.setdefault("maximum", MAX_INTEGER)


def check_keywords(schema: object) -> None:
    """Raise UnsupportedError, naming keyword and place, for what could not be honoured; no `param` is given."""
    pending: list[tuple[object, str, int]] = [(schema, "#", 0)]
    while pending:
        found, place, depth = pending.pop()
        if isinstance(found, bool):
            continue
        if not isinstance(found, dict):
            raise InvalidRequestError(f"the schema at {place} is {str(found)[:40]!r}; allowed: an object or a boolean")
        if depth > MAX_DEPTH:
            raise UnsupportedError(f"the schema is nested deeper than {MAX_DEPTH} levels at {place[:200]}")
        for keyword, value in found.items():
            if keyword not in KNOWN and not keyword.startswith("x-"):
                hint = ' (write "type": ["…", "null"])' if keyword == "nullable" else ""
                raise UnsupportedError(f"the schema's keyword {keyword[:60]!r} at {place[:200]} is not supported{hint}")
            pending += [(each, f"{place}/{where}", depth + 1) for where, each in _subschemas(keyword, value)]
        _check_choices(found, place)


def _subschemas(keyword: str, value: object) -> Iterator[tuple[str, object]]:
    if keyword in ONE_SCHEMA or (keyword == "items" and not isinstance(value, list)):
        yield keyword, value
    elif keyword in SOME_SCHEMAS or keyword == "items":
        if not isinstance(value, list):
            raise InvalidRequestError(f"the schema's {keyword} is {str(value)[:40]!r}; allowed: a list of schemas")
        for i, each in enumerate(value):
            yield f"{keyword}/{i}", each
    elif keyword in NAMED_SCHEMAS:
        if not isinstance(value, dict):
            raise InvalidRequestError(f"the schema's {keyword} is {str(value)[:40]!r}; allowed: an object of schemas")
        for name, each in value.items():
            yield f"{keyword}/{name[:60]}", each


def _check_choices(schema: Mapping[str, Any], place: str) -> None:
    required = schema.get("required")
    names = set(required) if isinstance(required, list) and all(isinstance(name, str) for name in required) else set()
    num_choices = len(schema.get("properties", {}).keys() - names)
    if num_choices > MAX_CHOICES:
        raise UnsupportedError(
            f"the schema at {place[:200]} has {num_choices} properties that are not required; allowed: {MAX_CHOICES}"
        )
