"""One streaming request: its body, and the clock on its events.

Cheap by design, since it runs beside the server: bodies are made before the clock starts, an event costs one typed
JSON decode and one timestamp. Knows nothing of load.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from servd.benchmark.requests import BenchRequest
from servd.benchmark.results import RequestRow

CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2.0  # less than any server's own: a connection closed under a request would count as its failure
MAX_MESSAGE = 300  # characters of a server's error kept in a row
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How requests are sent; greedy and of fixed length unless `extra_body` says otherwise."""

    endpoint: str = "completions"  # or "chat"
    ignore_eos: bool = True  # an extension: not for servers that refuse it
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    timeout: float = 600.0  # seconds for one request

    def body(self, model: str, request: BenchRequest) -> bytes:
        """The JSON to send. A chat prompt must be text."""
        body: dict[str, Any] = {
            "model": model, "max_tokens": request.output_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body | dict(self.extra_body))

    def session(self) -> aiohttp.ClientSession:
        """Connections for one run, as many as it takes. The environment's proxy settings do not count."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=self.timeout, sock_connect=min(CONNECT_SECONDS, self.timeout)),
        )


def base_url(url: str) -> str:
    """The URL without a trailing /v1."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


@dataclass(slots=True)
class LoadWatch:
    """Counters of a run in progress, for whoever shows it."""

    total: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    pieces: int = 0  # of text, about a token each
    ttfts_ms: list[float] = field(default_factory=list)


class RequestFailed(Exception):
    """A request got no whole answer."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def has_piece(self) -> bool:
        """Whether a token came: an empty text counts too (half a character), a role or a finish reason alone not."""
        delta = self.delta
        if delta is None:
            return bool(self.text) or self.finish_reason is None
        if delta.content or delta.reasoning_content or delta.reasoning:
            return True
        return self.finish_reason is None and delta.role is None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_EVENTS = msgspec.json.Decoder(_Event)


class _Stream:
    """The events of one answer, as far as they have come."""

    __slots__ = ("_rest", "is_done", "finished", "piece_times", "end", "usage")

    def __init__(self) -> None:
        self._rest = b""
        self.piece_times: list[float] = []  # perf_counter seconds
        self.end = 0.0  # of the last event
        self.usage: _Usage | None = None
        self.finished = False  # a finish reason was seen
        self.is_done = False  # [DONE] was

    def feed(self, data: bytes, now: float) -> int:
        """Take in what arrived at `now`; the number of new pieces. Raises RequestFailed for an error event."""
        before = len(self.piece_times)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)
        return len(self.piece_times) - before

    def _take(self, event_json: bytes, now: float) -> None:
        self.end = now
        if event_json == b"[DONE]":
            self.is_done = True
            return
        try:
            event = _EVENTS.decode(event_json)
        except ValueError as error:  # no JSON, other JSON, or no UTF-8
            raise RequestFailed("event", f"{error}: {event_json[:MAX_MESSAGE]!r}") from None
        if event.error is not None:
            has_message = isinstance(event.error, dict) and "message" in event.error
            raise RequestFailed("event", str(event.error["message"] if has_message else event.error))
        if event.usage is not None:
            self.usage = event.usage
        for choice in event.choices:
            if choice.has_piece():
                self.piece_times.append(now)
            if choice.finish_reason is not None:
                self.finished = True


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    request: BenchRequest,
    watch: LoadWatch,
    origin: float,
    due: float | None = None,
) -> RequestRow:
    """Send one request and time its answer; a failure becomes the row's `error`.

    `origin` and `due` are perf_counter seconds: the run's start, and when the request was to leave (by default now).
    """
    stream = _Stream()
    kind = message = None
    watch.running += 1
    start = time.perf_counter() if due is None else due
    try:
        async with session.post(url, data=body, allow_redirects=False) as response:
            if response.status != 200:
                raise RequestFailed(f"http {response.status}", await words_of(response))
            while data := await response.content.readany():
                now = time.perf_counter()
                new = stream.feed(data, now)
                if new:
                    if new == len(stream.piece_times):
                        watch.ttfts_ms.append((now - start) * 1e3)
                    watch.pieces += new
        if not (stream.finished or stream.is_done):
            raise RequestFailed("cut off", "the stream ended without a finish reason and without [DONE]")
        if not stream.piece_times:
            raise RequestFailed("empty", "the answer holds no token")
    except RequestFailed as error:
        kind, message = error.kind, str(error)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        if not stream.is_done:  # else the answer is whole, whatever became of its connection
            kind, message = failure_kind(error), str(error) or type(error).__name__
    watch.running -= 1
    watch.done += 1
    watch.failed += kind is not None
    row = _row(request, stream, start, origin)
    row.error, row.message = kind, message and message[:MAX_MESSAGE]
    return row


async def words_of(response: aiohttp.ClientResponse) -> str:
    """The beginning of a body in one line, whatever it is encoded in."""
    return " ".join((await response.read()).decode("utf-8", "replace").split())[:MAX_MESSAGE]


def failure_kind(error: Exception) -> str:
    """A failure of the connection in a word."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "refused"
    return "broken"


async def ask_quietly(session: aiohttp.ClientSession, url: str, body: bytes, request: BenchRequest) -> RequestRow:
    """One request outside any run."""
    return await ask(session, url, body, request, LoadWatch(), time.perf_counter())


def _row(request: BenchRequest, stream: _Stream, start: float, origin: float) -> RequestRow:
    times = stream.piece_times
    usage = stream.usage
    return RequestRow(
        id=request.id,
        start_s=round(start - origin, 6),
        prompt_tokens=usage.prompt_tokens if usage else request.num_prompt_tokens,
        output_tokens=usage.completion_tokens if usage else len(times),
        asked_tokens=request.output_tokens,
        ttft_ms=round((times[0] - start) * 1e3, 3) if times else None,
        e2e_ms=round(((stream.end or time.perf_counter()) - start) * 1e3, 3),
        itl_ms=[round((b - a) * 1e3, 3) for a, b in zip(times, times[1:], strict=False)],
        has_usage=usage is not None,
    )
