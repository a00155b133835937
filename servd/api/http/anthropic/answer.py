"""A message as its answer grows: its content blocks, and the events that tell of them.

Source: Anthropic's API reference (streaming messages). Knows nothing of engines or connections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from servd.api.chat.parts import Part, ReasoningPart, TextPart
from servd.api.http.anthropic.errors import error_dict
from servd.errors import ServdError
from servd.outputs import RequestOutput
from servd.request import FinishReason

# kind → (the type of its deltas, the key of their text)
_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


@dataclass(slots=True)
class _OpenBlock:
    """The content block that the answer is at."""

    kind: str
    empty: dict[str, Any]  # as it begins
    call_index: int | None
    delta_head: bytes
    pieces: list[str] = field(default_factory=list)

    def whole(self) -> dict[str, Any]:
        """The complete block."""
        text = "".join(self.pieces)
        return self.empty | ({"input": _json_object(text)} if self.kind == "tool_use" else {self.kind: text})


class MessageAnswer:
    """One message. Its methods return the events that they bring about, whole."""

    def __init__(self, message_id: str, model: str) -> None:
        self.reasonings: list[str] = []
        self._head = {"id": message_id, "type": "message", "role": "assistant", "model": model}
        self._content: list[dict[str, Any]] = []
        self._open: _OpenBlock | None = None
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._usage: dict[str, Any] = {}

    def as_dict(self) -> dict[str, Any]:
        """The message as it stands; a block that still grows is not in it."""
        return self._head | {"content": self._content} | self._stop | {"usage": self._usage}

    def begin(self, output: RequestOutput) -> list[bytes]:
        """The prompt has been read: `output` is the first news."""
        self._count(output)
        self._usage["output_tokens"] = 0
        return [_event("message_start", message=self.as_dict()), _event("ping")]

    def add(self, parts: Sequence[Part]) -> list[bytes]:
        """Take in the next parts."""
        events: list[bytes] = []
        for part in parts:
            if isinstance(part, TextPart):
                self._open_block(events, "text", {"type": "text", "text": ""})
                self._add_text(events, part.text)
            elif isinstance(part, ReasoningPart):
                self._open_block(events, "thinking", {"type": "thinking", "thinking": "", "signature": ""})
                self.reasonings.append(part.text)
                self._add_text(events, part.text)
            else:
                block: dict[str, Any] = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
                self._open_block(events, "tool_use", block, part.index)
                self._add_text(events, part.arguments)
        return events

    def finish(self, output: RequestOutput, *, thinking_tokens: int) -> list[bytes]:
        """The answer has ended."""
        events: list[bytes] = []
        self._close_block(events)
        self._count(output)
        self._usage["output_tokens_details"] = {"thinking_tokens": thinking_tokens}
        self._stop = {"stop_reason": "end_turn", "stop_sequence": None}
        if output.finish_reason is FinishReason.LENGTH:
            self._stop["stop_reason"] = "max_tokens"
        elif isinstance(output.stop_reason, str):
            self._stop = {"stop_reason": "stop_sequence", "stop_sequence": output.stop_reason}
        elif any(block["type"] == "tool_use" for block in self._content):
            self._stop["stop_reason"] = "tool_use"
        return [*events, _event("message_delta", delta=self._stop, usage=self._usage), _event("message_stop")]

    def _count(self, output: RequestOutput) -> None:
        self._usage = {
            "input_tokens": output.num_prompt_tokens - output.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": output.num_cached_tokens,
            "output_tokens": output.num_output_tokens,
        }

    def _open_block(
        self, events: list[bytes], kind: str, empty: dict[str, Any], call_index: int | None = None
    ) -> None:
        """Go on with the open block if it is the same, else close it and begin another."""
        current = self._open
        if current is not None and (current.kind, current.call_index) == (kind, call_index):
            return
        self._close_block(events)
        index = len(self._content)
        delta, key = _DELTAS[kind]
        fields = msgspec.json.encode({"type": "content_block_delta", "index": index})
        head = b"event: content_block_delta\ndata: " + fields[:-1] + f',"delta":{{"type":"{delta}","{key}":'.encode()
        self._open = _OpenBlock(kind, empty, call_index, head)
        events.append(_event("content_block_start", index=index, content_block=empty))

    def _add_text(self, events: list[bytes], text: str) -> None:
        assert self._open is not None
        if text:
            self._open.pieces.append(text)
            events.append(self._open.delta_head + msgspec.json.encode(text) + b"}}\n\n")

    def _close_block(self, events: list[bytes]) -> None:
        block = self._open
        if block is None:
            return
        self._open = None
        index = len(self._content)
        if block.kind == "thinking":  # clients wait for it; servd signs nothing, and checks none
            signature = {"type": "signature_delta", "signature": ""}
            events.append(_event("content_block_delta", index=index, delta=signature))
        events.append(_event("content_block_stop", index=index))
        self._content.append(block.whole())


def error_event(error: ServdError) -> bytes:
    """What ends a stream that fails."""
    return _event("error", error=error_dict(error))


def _event(name: str, **fields: Any) -> bytes:
    return f"event: {name}\ndata: ".encode() + msgspec.json.encode({"type": name} | fields) + b"\n\n"


def _json_object(text: str) -> dict[str, Any]:
    """Empty for arguments that are cut short: the stop reason tells."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {}
