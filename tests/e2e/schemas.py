"""Sixty JSON schemas of growing difficulty, each of which a small model can satisfy in a few hundred tokens."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
WORD: Schema = {"type": "string", "pattern": "^[a-z]{1,8}$"}
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 12}
AGE: Schema = {"type": "integer", "minimum": 0, "maximum": 120}


def closed(properties: Schema, *required: str, **more: Any) -> Schema:
    """An object with these properties and no others; all are required unless some are named."""
    return {
        "type": "object", "properties": properties, "required": list(required or properties),
        "additionalProperties": False, **more,
    }  # fmt: skip


def some(items: Schema, low: int = 0, high: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def of_format(name: str) -> Schema:
    return {"type": "string", "format": name}


SCALARS: list[Schema] = [
    {"type": "boolean"},
    {"type": "null"},
    AGE,
    NAME,
    WORD,
    {"enum": ["red", "green", "blue"]},
    {"const": {"version": 2, "tags": ["a", None]}},
    {"type": "number", "minimum": -1.5, "maximum": 2.25, "multipleOf": 0.25},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "multipleOf": 0.125},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    {"type": ["integer", "null"], "minimum": 10, "maximum": 99},
    {"type": "string", "pattern": "^(\\+1-)?[2-9][0-9]{2}-[0-9]{4}$"},
    {"type": "string", "pattern": "[0-9]", "maxLength": 12},
    {"enum": [1, "1", True, None, [1], {"a": 1}]},
    {"type": "string", "minLength": 3, "maxLength": 3},
]
FORMATS: list[Schema] = [
    of_format("date"), of_format("time"), of_format("date-time"), of_format("uuid"), of_format("ipv4"),
    {"type": "string", "format": "email", "maxLength": 40}, of_format("ipv6"), of_format("duration"),
]  # fmt: skip
ARRAYS: list[Schema] = [
    some(AGE, 1, 4),
    some(WORD, 3, 3),
    some({"type": "boolean"}, 0, 8),
    some(some({"type": "integer", "minimum": 0, "maximum": 9}, 2, 2), 2, 2),
    {"type": "array", "prefixItems": [WORD, AGE, {"type": "boolean"}], "items": False, "minItems": 3},
    {"type": "array", "prefixItems": [WORD], "items": AGE, "minItems": 2, "maxItems": 4},
    some({"anyOf": [AGE, WORD, {"type": "null"}]}, 1, 5),
]
OBJECTS: list[Schema] = [
    closed({"name": NAME}),
    closed({"name": NAME, "age": AGE}),
    closed({"name": NAME, "age": AGE, "email": {"type": "string", "maxLength": 20}}, "name"),
    closed({"a": WORD, "b": WORD, "c": WORD, "d": WORD}, "d"),
    {"type": "object", "properties": {"name": NAME}, "required": ["name", "extra"], "additionalProperties": AGE,
     "maxProperties": 3},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^x_[a-z]{1,6}$": AGE}, "additionalProperties": False,
     "minProperties": 1, "maxProperties": 3},
    closed({"not": WORD, "if": WORD, "$ref": WORD, 'quo"te': WORD, "naïve 😀": AGE}),
    closed({"point": closed({"x": {"type": "number", "multipleOf": 0.5, "maximum": 1, "minimum": -1}, "y": AGE}),
            "label": NAME}),
    closed({"tags": some(WORD), "matrix": some(some(AGE, 1, 2), 1, 2)}),
    closed({"status": {"enum": ["ok", "failed"]}, "code": {"const": 7}, "note": {"type": ["string", "null"],
                                                                                "maxLength": 10}}),
    closed({f"field_{i}": AGE for i in range(20)}),
    closed({"a": closed({"b": closed({"c": closed({"d": closed({"e": AGE})})})})}),
]  # fmt: skip
CHOICES: list[Schema] = [
    {"anyOf": [AGE, WORD]},
    {"anyOf": [closed({"kind": {"const": "circle"}, "radius": AGE}), closed({"kind": {"const": "box"}, "side": AGE})]},
    {"oneOf": [closed({"type": {"const": "a"}, "x": AGE}), closed({"type": {"const": "b"}, "x": WORD})]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]},
    {"allOf": [{"type": "object", "properties": {"a": AGE}, "required": ["a"]},
               {"properties": {"b": WORD}, "required": ["b"]}], "maxProperties": 2},
    closed({"result": {"anyOf": [closed({"value": AGE}), closed({"error": NAME})]}, "id": of_format("uuid")}),
    {"type": "object", "properties": {"v": {"anyOf": [{"type": "null"}, some(AGE, 1, 2)]}}, "required": ["v"],
     "additionalProperties": False},
]  # fmt: skip
REFERENCES: list[Schema] = [
    {"$ref": "#/$defs/person", "$defs": {"person": closed({"name": NAME, "age": AGE})}},
    closed({"from": {"$ref": "#/definitions/place"}, "to": {"$ref": "#/definitions/place"}},
           definitions={"place": closed({"city": NAME, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})}),
    {"$ref": "#/$defs/list", "$defs": {"list": closed({"head": AGE, "tail": {"anyOf": [{"type": "null"},
                                                                           {"$ref": "#/$defs/list"}]}})}},
    {"$ref": "#/$defs/tree", "$defs": {"tree": closed({"v": {"type": "boolean"}, "kids": some({"$ref": "#/$defs/tree"},
                                                                                         0, 1)})}},
    {"$ref": "#/$defs/expr", "$defs": {"expr": {"anyOf": [
        {"type": "integer", "minimum": 0, "maximum": 9},
        closed({"op": {"enum": ["neg", "abs"]}, "of": {"$ref": "#/$defs/expr"}})]}}},
    closed({"a": {"$ref": "#/$defs/even"}}, **{"$defs": {
        "even": {"anyOf": [{"type": "null"}, closed({"odd": {"$ref": "#/$defs/odd"}})]},
        "odd": closed({"even": {"$ref": "#/$defs/even"}})}}),
]  # fmt: skip
WHOLE: list[Schema] = [
    closed({  # as pydantic writes it
        "order": {"$ref": "#/$defs/Order"},
        "priority": {"default": "low", "enum": ["low", "high"], "title": "Priority"},
    }, title="Request", description="An order.", **{"$defs": {
        "Item": closed({"sku": {"title": "Sku", "type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                        "count": {"title": "Count", "type": "integer", "exclusiveMinimum": 0, "maximum": 99}}),
        "Order": closed({"items": some({"$ref": "#/$defs/Item"}, 1, 2), "paid": {"type": "boolean", "default": False},
                         "when": {"anyOf": [of_format("date"), {"type": "null"}]}}, title="Order")}}),
    closed({"tool": {"const": "get_weather"}, "arguments": closed({
        "city": NAME, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}}, "city")}),
    closed({"steps": some(closed({"explanation": {"type": "string", "maxLength": 30},
                                  "output": {"type": "string", "maxLength": 10}}), 1, 2), "final_answer": NAME}),
    closed({"events": some({"anyOf": [closed({"type": {"const": "key"}, "code": AGE}),
                                      closed({"type": {"const": "move"}, "dx": {"type": "integer", "minimum": -9,
                                                                                "maximum": 9}})]}, 1, 3)}),
]  # fmt: skip
SCHEMAS = SCALARS + FORMATS + ARRAYS + OBJECTS + CHOICES + REFERENCES + WHOLE
