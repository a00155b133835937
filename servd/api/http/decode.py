"""A body's bytes become a checked msgspec struct, or an InvalidRequestError that names the field.

Owns the wording of JSON and type errors; knows nothing of any one endpoint's fields.
"""

from __future__ import annotations

import asyncio
import re
from itertools import accumulate
from typing import TypeVar

import msgspec
from aiohttp import web

from servd.api.http.context import BODY_TIMEOUT, SERVER_CONFIG
from servd.api.http.errors import UnsupportedEncodingError
from servd.errors import DeadlineExceededError, InvalidRequestError, PayloadTooLargeError

T = TypeVar("T")

_QUICK_BYTES = 1 << 18  # scanned in a millisecond or two
_MAX_SCAN_BYTES = 1 << 20  # look for the key before a syntax error in no more than this

_WRONG_TYPE = re.compile(r"Expected `(?P<wanted>[^`]*)`, got `(?P<got>[^`]*)`")
_PATH = re.compile(r" - at `(?P<key>key` in `)?\$\.?(?P<path>[^`]*)`$")
_BYTE = re.compile(r"\(byte (\d+)\)$")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[{}\[\]:,]', re.DOTALL)  # possessive: linear also where a string has no end
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # linear also where a string has no end
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # one level down, one up
_SLICE = 4096  # too deep a body is noticed within so many brackets
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LITERAL = re.compile(rb"[^\s,\]}]{1,40}")
_NOT_FINITE = re.compile(rb"-?(nan|inf)", re.IGNORECASE)
_TYPE_NAMES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


async def read_body(request: web.Request) -> bytes:
    """The whole body, at most `max_body_bytes`.

    Raises PayloadTooLargeError, UnsupportedEncodingError, DeadlineExceededError, InvalidRequestError.
    """
    for encoding in request.headers.getall("Content-Encoding", []):
        if encoding.lower() != "identity":
            raise UnsupportedEncodingError(
                f"header Content-Encoding is {encoding[:100]!r}; allowed: identity, a body that is not compressed"
            )
    config = request.app[SERVER_CONFIG]
    limit = config.max_body_bytes
    too_large = PayloadTooLargeError(f"the body is too large; allowed: at most {limit} bytes")
    if request.content_length is not None and request.content_length > limit:
        raise too_large
    seconds = request.app[BODY_TIMEOUT]
    try:
        async with asyncio.timeout(seconds):
            if request.content_length is None:
                body = await _read_chunks(request, limit, config.max_body_chunks)
            else:
                body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except TimeoutError:
        raise DeadlineExceededError(f"the body did not arrive within {seconds:g} seconds") from None
    except web.RequestPayloadError:
        raise InvalidRequestError("the body cannot be read: its chunks are broken") from None
    if len(body) <= _QUICK_BYTES:
        check_depth(body, config.max_json_depth)
    else:
        await asyncio.to_thread(check_depth, body, config.max_json_depth)
    return body


async def _read_chunks(request: web.Request, limit: int, max_chunks: int) -> bytes:
    """A body of unknown length. Chunks of a byte each would keep the event loop busy for seconds."""
    body = bytearray()
    num_chunks = 0
    async for data, is_end in request.content.iter_chunks():
        num_chunks += is_end
        body += data
        if num_chunks > max_chunks:
            raise PayloadTooLargeError(f"the body has too many chunks; allowed: at most {max_chunks}")
        if len(body) > limit:
            raise web.HTTPRequestEntityTooLarge(limit, len(body))
    return bytes(body)


def check_depth(body: bytes, limit: int) -> None:
    """Raise InvalidRequestError for JSON nested deeper than `limit`, before anything recurses into it.

    Strings and all but brackets are dropped, and the rest is summed up without a stack. What is not JSON may pass; the
    parser refuses it.
    """
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    steps = memoryview(_STRING.sub(b"", body).translate(_STEPS, _NO_BRACKETS)).cast("b")
    depth = 0
    for start in range(0, len(steps), _SLICE):
        depths = list(accumulate(steps[start : start + _SLICE], initial=depth))
        depth = depths[-1]
        if max(depths) > limit:
            raise InvalidRequestError(f"the body is nested too deeply; allowed: {limit} arrays and objects")


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Parse and type-check a JSON object. Raises InvalidRequestError naming the field, where there is one to name."""
    if not body.strip():
        raise InvalidRequestError("the body is empty; allowed: a JSON object")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _type_error(str(error)) from None
    except msgspec.DecodeError as error:
        raise _syntax_error(str(error), body) from None
    except UnicodeDecodeError:
        raise InvalidRequestError("the body is not valid UTF-8") from None
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply") from None


def _type_error(message: str) -> InvalidRequestError:
    """Reword msgspec's 'Expected `int | null`, got `str` - at `$.n`'."""
    found = _PATH.search(message)
    path = found["path"].replace("[...]", "") if found else ""
    where = path or "the body"
    fact = message[: found.start()] if found else message
    if wrong := _WRONG_TYPE.match(fact):
        wanted = _type_names(wrong["wanted"])
        text = f"{where} is {_type_names(wrong['got'])}; allowed: {wanted}"
    elif "out of range" in fact:
        text = f"{where} is a number too large to hold; allowed: a finite number"
    elif named := re.match(r"Object (missing required|contains unknown) field `(.*)`", fact, re.DOTALL):
        field = f"{path}.{named[2]}" if path else named[2]
        problem = "is missing; it is required" if named[1] == "missing required" else "is not a field that servd knows"
        return InvalidRequestError(f"{field} {problem}", param=field)
    else:
        text = f"{where}: {fact}"
    return InvalidRequestError(text, param=path or None)


def _type_names(names: str) -> str:
    return " or ".join(_TYPE_NAMES.get(name, name) for name in names.split(" | "))


def _syntax_error(message: str, body: bytes) -> InvalidRequestError:
    """Name the field whose value broke the syntax: NaN and Infinity are what clients really send."""
    position = int(found[1]) if (found := _BYTE.search(message)) else None
    field = None if position is None or position > _MAX_SCAN_BYTES else _field_before(body, position)
    if field is not None and position is not None:
        start = position  # back to where the literal begins: the parser stops after the n of nan, the - of -Infinity
        while start > 0 and position - start < 5 and body[start - 1] not in b" \t\r\n:,[":
            start -= 1
        if (literal := _LITERAL.match(body, start)) and _NOT_FINITE.match(literal[0]):
            value = literal[0].decode(errors="replace")
            return InvalidRequestError(f"{field} is {value}; allowed: a finite number", param=field)
    if "truncated" in message and re.search(rb"\\u[dD][89a-fA-F]", body):
        message = "it is cut off, or a \\ud800 to \\udfff escape lacks its other half"
    text = f"the body is not valid JSON ({message.removeprefix('JSON is malformed: ')})"
    return InvalidRequestError(f"{field}: {text}" if field else text, param=field)


def _field_before(body: bytes, position: int) -> str | None:
    """The top-level key in whose value the byte at `position` lies."""
    depth = 0
    last: bytes | None = None
    key: bytes | None = None
    for match in _TOKEN.finditer(body, 0, position):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
        elif token in (b"}", b"]"):
            depth -= 1
        elif depth == 1:
            if token == b":":
                key = last
            elif token == b",":
                key = None
            else:
                last = token
    return None if key is None else key[1:-1][:100].decode(errors="replace")
