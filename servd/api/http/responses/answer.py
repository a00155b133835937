"""A response as its answer grows: the items of its output, the events that tell of them, and how it stands.

Source: OpenAI's API reference (streaming events). Knows nothing of engines, connections or storage.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from servd.api.chat.parts import Part, ReasoningPart, TextPart
from servd.errors import OverloadedError, ServdError
from servd.request import FinishReason

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
# kind → (what its text's events are called, the key of the text in the last of them)
_TEXT_EVENTS = {
    "message": ("response.output_text", "text"),
    "reasoning": ("response.reasoning_text", "text"),
    "function_call": ("response.function_call_arguments", "arguments"),
}


@dataclass(slots=True)
class _OpenItem:
    """The item that the answer is at."""

    kind: str
    id: str
    output_index: int
    call: dict[str, Any] = field(default_factory=dict)  # call_id and name, of a function call
    call_index: int | None = None
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    delta_head: bytes = b""

    def place(self) -> dict[str, Any]:
        """Where its events say they belong."""
        where: dict[str, Any] = {"item_id": self.id, "output_index": self.output_index}
        return where if self.kind == "function_call" else where | {"content_index": 0}

    def part(self, text: str) -> dict[str, Any]:
        """Its only part of content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}

    def as_dict(self, status: str) -> dict[str, Any]:
        """The item; without content while it has just been opened."""
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        text = "".join(self.pieces)
        if self.kind == "function_call":
            return item | self.call | {"arguments": text}
        content = [] if status == "in_progress" and not self.pieces else [self.part(text)]
        extra: dict[str, Any] = {"role": "assistant"} if self.kind == "message" else {"summary": []}
        return item | extra | {"content": content}


class ResponseAnswer:
    """One response. Its methods return the events that they bring about, whole."""

    def __init__(self, head: dict[str, Any], *, queued: bool = False) -> None:
        """`head`: what the response says from beginning to end. `queued`: nobody waits for it, until it is begun."""
        self.id: str = head["id"]
        self.failure: ServdError | None = None
        self.is_stored = bool(head["store"])
        self.is_unwanted = False  # set by who closes the stream that it is read from
        self.reasonings: list[str] = []
        self._head = head
        self._status = "queued" if queued else "in_progress"
        self._output: list[dict[str, Any]] = []
        self._open: _OpenItem | None = None
        self._number = 0
        self._usage: dict[str, Any] | None = None
        self._completed_at: int | None = None
        self._incomplete: dict[str, str] | None = None
        self._error: dict[str, str] | None = None
        self._held_logprobs: list[dict[str, Any]] = []  # of tokens that have given no text yet

    def as_dict(self) -> dict[str, Any]:
        """The response as it stands."""
        output = self._output if self._open is None else [*self._output, self._open.as_dict("in_progress")]
        return self._head | {
            "store": self.is_stored,
            "status": self._status,
            "completed_at": self._completed_at,
            "error": self._error,
            "incomplete_details": self._incomplete,
            "output": output,
            "usage": self._usage,
        }

    @property
    def output(self) -> list[dict[str, Any]]:
        """The items that are complete."""
        return self._output

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._status not in ("queued", "in_progress")

    def begin(self) -> list[bytes]:
        """Say that it was taken."""
        return [self._event("response.created", response=self.as_dict()), self._lifecycle()]

    def start(self) -> list[bytes]:
        """Say that work has begun, if it was queued."""
        if self._status != "queued":
            return []
        self._status = "in_progress"
        return [self._lifecycle()]

    def add(self, parts: Sequence[Part], logprobs: Sequence[dict[str, Any]] = ()) -> list[bytes]:
        """Take in the next parts; `logprobs` are those of their tokens, where the answer is text alone."""
        events: list[bytes] = []
        self._held_logprobs += logprobs
        for part in parts:
            if isinstance(part, TextPart):
                self._open_item(events, "message")
                self._add_text(events, part.text)
            elif isinstance(part, ReasoningPart):
                self._open_item(events, "reasoning")
                self.reasonings.append(part.text)
                self._add_text(events, part.text)
            else:
                self._open_item(events, "function_call", {"call_id": part.id, "name": part.name}, part.index)
                self._add_text(events, part.arguments)
        return events

    def finish(self, reason: FinishReason, usage: dict[str, Any]) -> list[bytes]:
        """The answer has ended: of itself, or because it was long enough. `last_events` tell of it."""
        events: list[bytes] = []
        cut = reason is FinishReason.LENGTH
        if self._open is None and not self._output:
            self._open_item(events, "message")  # an answer of no text
        self._add_text(events, "")
        self._close_item(events, "incomplete" if cut else "completed")
        self._usage = usage
        if cut:
            self._status = "incomplete"
            self._incomplete = {"reason": "max_output_tokens"}
        else:
            self._status = "completed"
            self._completed_at = int(time.time())
        return events

    def fail(self, error: ServdError) -> list[bytes]:
        """The answer could not be completed."""
        self.failure = error
        self._status = "failed"
        code = "rate_limit_exceeded" if isinstance(error, OverloadedError) else "server_error"
        self._error = {"code": code, "message": error.message}
        events: list[bytes] = []
        self._close_item(events, "incomplete")
        return events

    def cancel(self) -> list[bytes]:
        """The client does not want it any more."""
        self._status = "cancelled"
        events: list[bytes] = []
        self._close_item(events, "incomplete")
        return events

    def last_events(self) -> list[bytes]:
        """How it ended."""
        if self._status == "cancelled":  # for which there is no event of its own
            message = "the response was cancelled"
            return [self._event("error", code="response_cancelled", message=message, param=None)]
        if self.failure is None:
            return [self._lifecycle()]
        error = self.failure
        return [self._event("error", code=error.code, message=error.message, param=error.param), self._lifecycle()]

    # -- items ---------------------------------------------------------------------------------------------------

    def _open_item(
        self, events: list[bytes], kind: str, call: dict[str, Any] | None = None, call_index: int | None = None
    ) -> None:
        """Go on with the open item if it is the same, else close it and begin another."""
        current = self._open
        if current is not None and (current.kind, current.call_index) == (kind, call_index):
            return
        self._close_item(events, "completed")
        index = len(self._output)
        item_id = f"{_PREFIXES[kind]}_{self.id.partition('_')[2]}{index:02x}"
        item = _OpenItem(kind, item_id, index, call or {}, call_index)
        self._open = item
        events.append(self._event("response.output_item.added", output_index=index, item=item.as_dict("in_progress")))
        if kind != "function_call":
            events.append(self._event("response.content_part.added", **item.place(), part=item.part("")))
        name = f"{_TEXT_EVENTS[kind][0]}.delta"
        fields = msgspec.json.encode({"type": name} | item.place())
        item.delta_head = f"event: {name}\ndata: ".encode() + fields[:-1] + b',"sequence_number":%d,"delta":%b'

    def _add_text(self, events: list[bytes], text: str) -> None:
        item = self._open
        if item is None or not (text or self._held_logprobs):
            return
        item.pieces.append(text)
        event = item.delta_head % (self._number, msgspec.json.encode(text))
        self._number += 1
        if item.kind == "message":
            event += b',"logprobs":' + msgspec.json.encode(self._held_logprobs)
            item.logprobs += self._held_logprobs
            self._held_logprobs = []
        events.append(event + b"}\n\n")

    def _close_item(self, events: list[bytes], status: str) -> None:
        item = self._open
        if item is None:
            return
        self._open = None
        text = "".join(item.pieces)
        name, key = _TEXT_EVENTS[item.kind]
        done = item.place() | {key: text}
        if item.kind == "message":
            done["logprobs"] = item.logprobs
        events.append(self._event(f"{name}.done", **done))
        if item.kind != "function_call":
            events.append(self._event("response.content_part.done", **item.place(), part=item.part(text)))
        self._output.append(item.as_dict(status))
        events.append(
            self._event("response.output_item.done", output_index=item.output_index, item=self._output[-1])
        )

    # -- events --------------------------------------------------------------------------------------------------

    def _lifecycle(self) -> bytes:
        return self._event(f"response.{self._status}", response=self.as_dict())

    def _event(self, name: str, **fields: Any) -> bytes:
        data = {"type": name, "sequence_number": self._number} | fields
        self._number += 1
        return f"event: {name}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


def usage_dict(prompt_tokens: int, cached_tokens: int, output_tokens: int, reasoning_tokens: int) -> dict[str, Any]:
    """Tokens of one answer, in the shape of Responses."""
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": prompt_tokens + output_tokens,
    }
