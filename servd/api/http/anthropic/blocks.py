"""The messages of Anthropic's clients, checked and turned into those of chat templates.

A user's message of several kinds of blocks becomes several: each tool's result is one. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from servd.api.conversation import MAX_MESSAGES
from servd.api.http.fields import Fields
from servd.api.http.messages import MAX_PARTS
from servd.errors import InvalidRequestError, UnsupportedError

Message = dict[str, Any]

_BLOCKS = {
    "system": ("text",),
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
}


def check_cache_control(value: dict[str, Any] | None, where: str) -> None:
    """Raise InvalidRequestError for what is none; it has no effect: prefixes are cached without being asked."""
    if value is not None:
        fields = Fields(value, where)
        fields.choice("type", "ephemeral")
        if (ttl := fields.optional("ttl", str)) not in (None, "5m", "1h"):
            raise InvalidRequestError(f"{where}.ttl is {ttl[:100]!r}; allowed: '5m', '1h'", param=f"{where}.ttl")
        fields.close()


def template_messages(system: str | list[Any] | None, messages: list[Any]) -> list[Message]:
    """The conversation as chat templates take it: content is always a string.

    Raises InvalidRequestError or UnsupportedError naming messages[i].content[j].FIELD.
    """
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"messages has {len(messages)} entries; allowed: {MAX_MESSAGES}", param="messages")
    if not messages:
        raise InvalidRequestError("messages is empty; allowed: at least one message", param="messages")
    reader = _Reader()
    if system is not None:
        reader.add("system", system, "system")
    for i, message in enumerate(messages):
        fields = Fields(message, f"messages[{i}]")
        role = fields.choice("role", *_BLOCKS)
        content = fields.required("content", str, list)
        fields.close()
        reader.add(role, content, fields.path("content"))
    return reader.messages


class _Reader:
    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._num_blocks = 0

    def add(self, role: str, content: str | list[Any], where: str) -> None:
        """Take in a message."""
        if isinstance(content, str):
            self.messages.append({"role": role, "content": content})
            return
        message: Message = {"role": role, "content": ""}
        texts: list[str] = []
        added = False
        for j, block in enumerate(content):
            fields = self._block(block, f"{where}[{j}]")
            kind = _kind(fields, _BLOCKS[role])
            if kind == "tool_result":
                if texts:  # words before a result stay before it
                    self.messages.append(message | {"content": "\n".join(texts)})
                    texts = []
                self.messages.append(self._tool_result(fields))
                added = True
            elif kind == "text":
                texts.append(_text(fields))
            else:
                _ADD[kind](message, fields)
            fields.close()
        message["content"] = "\n".join(texts)
        if texts or role != "user" or not added:
            self.messages.append(message)

    def _block(self, value: object, where: str) -> Fields:
        self._num_blocks += 1
        if self._num_blocks > MAX_PARTS:
            raise InvalidRequestError(
                f"messages have over {MAX_PARTS} content blocks; allowed: {MAX_PARTS}", param="messages"
            )
        fields = Fields(value, where)
        check_cache_control(fields.optional("cache_control", dict), fields.path("cache_control"))
        return fields

    def _tool_result(self, fields: Fields) -> Message:
        """Templates know no failed result: its text says so."""
        message: Message = {"role": "tool", "tool_call_id": fields.required("tool_use_id", str)}
        content = fields.optional("content", str, list) or ""
        if isinstance(content, list):
            path, texts = fields.path("content"), []
            for k, block in enumerate(content):
                inner = self._block(block, f"{path}[{k}]")
                _kind(inner, ("text",))
                texts.append(_text(inner))
                inner.close()
            content = "\n".join(texts)
        failed = fields.optional("is_error", bool)
        fields.neutral("toolset_name")
        return message | {"content": f"Error: {content}" if failed else content}


def _kind(fields: Fields, allowed: tuple[str, ...]) -> str:
    kind: str = fields.required("type", str)
    if kind not in allowed:
        known = any(kind in blocks for blocks in _BLOCKS.values())
        error = InvalidRequestError if known else UnsupportedError
        raise error(
            f"{fields.path('type')} is {kind[:100]!r}; allowed here: {', '.join(map(repr, allowed))}",
            param=fields.path("type"),
        )
    return kind


def _text(fields: Fields) -> str:
    text: str = fields.required("text", str)
    fields.neutral("citations", [])
    return text


def _add_thinking(message: Message, fields: Fields) -> None:
    thought: str = fields.required("thinking", str)
    fields.optional("signature", str)
    before = message.get("reasoning_content")
    message["reasoning_content"] = thought if before is None else f"{before}\n{thought}"


def _add_tool_use(message: Message, fields: Fields) -> None:
    call_id: str = fields.required("id", str)
    function = {"name": fields.required("name", str), "arguments": fields.required("input", dict)}
    fields.neutral("caller", {"type": "direct"})
    fields.neutral("toolset_name")
    message.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})


_ADD: dict[str, Callable[[Message, Fields], None]] = {"thinking": _add_thinking, "tool_use": _add_tool_use}
