"""The items of a response's input: checked and put into one shape, kept in it, and turned into messages.

Knows nothing of where they are kept, nor of chat templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from servd.api.conversation import MAX_MESSAGES
from servd.api.http.fields import Fields
from servd.api.http.messages import MAX_PARTS
from servd.errors import InvalidRequestError, UnsupportedError

Item = dict[str, Any]
"""Checked: {"id", "type", "status", …} as GET …/input_items shows it."""

_ROLES = ("user", "assistant", "system", "developer")
_PARTS = {"assistant": ("output_text", "refusal")}  # other roles: input_text
_REFUSED_PARTS = ("input_image", "input_file", "input_audio", "image_url", "file", "audio")
_STATUSES = ("in_progress", "completed", "incomplete")


class _Reader:
    """Reads the items of one call."""

    def __init__(self, new_id: Callable[[str], str]) -> None:
        self._new_id = new_id
        self._num_parts = 0

    def item(self, value: object, where: str) -> Item:
        fields = Fields(value, where)
        kind: str = fields.optional("type", str) or "message"
        if kind not in _KINDS:
            raise UnsupportedError(
                f"{where}.type is {kind[:100]!r}; allowed: {', '.join(map(repr, _KINDS))}", param=f"{where}.type"
            )
        prefix, read = _KINDS[kind]
        given: str | None = fields.optional("id", str)
        if fields.optional("status", str) not in (None, *_STATUSES):
            raise InvalidRequestError(
                f"{where}.status is not known; allowed: {', '.join(_STATUSES)}", param=f"{where}.status"
            )
        item = {"id": given or self._new_id(prefix), "type": kind} | read(self, fields) | {"status": "completed"}
        fields.close()
        return item

    def message(self, fields: Fields) -> Item:
        role = fields.choice("role", *_ROLES)
        fields.neutral("phase")
        kinds = _PARTS.get(role, ("input_text",))
        content = fields.required("content", str, list)
        if isinstance(content, str):
            parts = [_text_part(kinds[0], content)]
        else:
            parts = [self.part(part, f"{fields.path('content')}[{i}]", kinds) for i, part in enumerate(content)]
        return {"role": role, "content": parts}

    def part(self, value: object, where: str, kinds: tuple[str, ...]) -> Item:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequestError(f"input has over {MAX_PARTS} parts; allowed: {MAX_PARTS}", param="input")
        fields = Fields(value, where)
        kind: str = fields.required("type", str)
        if kind in _REFUSED_PARTS:
            raise UnsupportedError(f"{where}.type is {kind!r}; servd reads text alone", param=f"{where}.type")
        if kind not in kinds:
            raise InvalidRequestError(
                f"{where}.type is {kind[:100]!r}; allowed: {', '.join(map(repr, kinds))}", param=f"{where}.type"
            )
        text: str = fields.required("refusal" if kind == "refusal" else "text", str)
        if kind == "output_text":
            fields.no_effect("annotations", "logprobs", "parsed")
        fields.close()
        return _text_part(kind, text)

    def function_call(self, fields: Fields) -> Item:
        arguments: str = fields.required("arguments", str)
        item = {"call_id": fields.required("call_id", str), "name": fields.required("name", str)}
        item["arguments"] = arguments
        if _json_object(arguments) is None:
            path = fields.path("arguments")
            raise InvalidRequestError(f"{path} is not the text of a JSON object", param=path)
        fields.neutral("namespace")
        fields.neutral("async", False)
        fields.neutral("caller", {"type": "direct"})
        fields.no_effect("parsed_arguments")
        return item

    def function_call_output(self, fields: Fields) -> Item:
        item: Item = {"call_id": fields.required("call_id", str)}
        output = fields.required("output", str, list)
        if isinstance(output, list):
            path = fields.path("output")
            output = [self.part(part, f"{path}[{i}]", ("input_text",)) for i, part in enumerate(output)]
        item["output"] = output
        fields.neutral("namespace")
        fields.neutral("caller", {"type": "direct"})
        fields.no_effect("name")
        return item

    def reasoning(self, fields: Fields) -> Item:
        fields.neutral("encrypted_content")
        texts: dict[str, list[Item]] = {}
        for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
            parts = fields.optional(name, list) or []
            texts[name] = [self.part(part, f"{fields.path(name)}[{i}]", (kind,)) for i, part in enumerate(parts)]
        return texts


_KINDS: dict[str, tuple[str, Callable[[_Reader, Fields], Item]]] = {
    "message": ("msg", _Reader.message),
    "function_call": ("fc", _Reader.function_call),
    "function_call_output": ("fco", _Reader.function_call_output),
    "reasoning": ("rs", _Reader.reasoning),
}


def read_input(given: str | list[Any] | None, new_id: Callable[[str], str]) -> list[Item]:
    """The items of a call's `input`; `new_id(prefix)` names those that have no id.

    Raises InvalidRequestError or UnsupportedError naming input[i].FIELD.
    """
    if given is None:
        return []
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if len(given) > MAX_MESSAGES:
        raise InvalidRequestError(f"input has {len(given)} items; allowed: {MAX_MESSAGES}", param="input")
    reader = _Reader(new_id)
    return [reader.item(value, f"input[{i}]") for i, value in enumerate(given)]


def template_messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The messages as chat templates take them.

    What one answer held (reasoning, text, calls) becomes one message again.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    turn: dict[str, Any] | None = None  # the answer that the next items may belong to
    for item in items:
        kind, role = item["type"], item.get("role")
        if kind == "function_call_output":
            turn = None
            messages.append({"role": "tool", "content": _joined(item["output"]), "tool_call_id": item["call_id"]})
        elif kind == "message" and role != "assistant":
            turn = None
            messages.append({"role": "system" if role == "developer" else role, "content": _joined(item["content"])})
        else:
            if turn is None or not _continues(turn, kind):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _add_to_turn(turn, item)
    return messages


def _continues(turn: dict[str, Any], kind: str) -> bool:
    """Whether such an item can follow what the answer has: reasoning comes first, then text, then calls."""
    if kind == "function_call":
        return True
    if kind == "message":
        return "tool_calls" not in turn and not turn["content"]
    return False


def _add_to_turn(turn: dict[str, Any], item: Item) -> None:
    match item["type"]:
        case "message":
            turn["content"] = _joined(item["content"])
        case "reasoning":
            turn["reasoning_content"] = _joined(item["content"] or item["summary"])
        case "function_call":
            arguments = _json_object(item["arguments"])  # templates print them as an object; one may be cut short
            function = {"name": item["name"], "arguments": item["arguments"] if arguments is None else arguments}
            call = {"id": item["call_id"], "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return None


def _joined(content: str | list[Item]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in content)


def _text_part(kind: str, text: str) -> Item:
    if kind == "refusal":
        return {"type": kind, "refusal": text}
    part: Item = {"type": kind, "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "output_text" else part
