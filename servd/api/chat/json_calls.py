"""Calls that a model writes as JSON objects: {"name": …, "arguments": {…}}, read while they grow.

Until name and arguments have begun, nothing is certain and all can still be text; from there on, what comes is the
call's arguments, as written, even where they are no valid JSON. Knows nothing of what stands around the objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator

from servd.api.chat.reading import Found, Source, Steps, Writer

ARGUMENT_KEYS = ("arguments", "parameters")

_IN_STRING = re.compile(r'[^"\\]+')
_BETWEEN = re.compile(r"[\w\s.,:+-]+", re.ASCII)  # JSON outside of strings and brackets
_SCALAR = re.compile(r"[\w.+-]+", re.ASCII)


def read_call(source: Source, writer: Writer, accepts: Callable[[str], bool]) -> Found:
    """Read one object. False: it is no call, and `source.release()` gives what was read of it.

    The caller has called `source.hold()`. `accepts`: whether a name can be called.
    """
    if not (yield from source.literal("{")):
        return False
    name: str | None = None
    early: list[str] | None = None  # arguments that came before the name
    has_begun = False
    yield from source.spaces()
    while (yield from source.peek()) == '"':
        key = yield from _string(source)
        yield from source.spaces()
        if key is None or not (yield from source.literal(":")):
            return has_begun
        yield from source.spaces()
        if key == "name" and not has_begun:
            name = (yield from _string(source)) if (yield from source.peek()) == '"' else None
            if name is None or not accepts(name):
                return False
            if early is not None:
                has_begun = _begin(source, writer, name, "".join(early))
        elif key in ARGUMENT_KEYS and not has_begun:
            emit: Callable[[str], object] = writer.arguments
            if name is None:
                early = []
                emit = early.append
            else:
                has_begun = _begin(source, writer, name, "")
            if not (yield from _arguments(source, emit)):
                return has_begun
        elif not (yield from read_value(source, _ignore)):
            return has_begun
        yield from source.spaces()
        if not (yield from source.literal(",")):
            break
        yield from source.spaces()
    if not (yield from source.literal("}")):
        return has_begun
    return has_begun or (name is not None and _begin(source, writer, name, "{}"))


def read_value(source: Source, emit: Callable[[str], object]) -> Found:
    """Pass one JSON value on, piece by piece. False: it broke off, where the source now stands.

    Of what is in brackets only strings and brackets are looked at.
    """
    depth = 0
    while char := (yield from source.peek()):
        if char == '"':
            if not (yield from _raw_string(source, emit)):
                return False
        elif char in "{[":
            depth += 1
            emit(source.take(1))
        elif char in "}]" and depth:
            depth -= 1
            emit(source.take(1))
        elif piece := source.run(_BETWEEN if depth else _SCALAR):
            emit(piece)
            if not depth:
                yield from _run_on(source, emit)
        else:
            return False
        if not depth:
            return True
    return False


def _begin(source: Source, writer: Writer, name: str, arguments: str) -> bool:
    source.release()
    writer.begin_call(name)
    writer.arguments(arguments)
    return True


def _run_on(source: Source, emit: Callable[[str], object]) -> Steps:
    """The rest of a number or word, which the pieces may have cut."""
    while (yield from source.more()):
        piece = source.run(_SCALAR)
        if not piece:
            return
        emit(piece)


def _arguments(source: Source, emit: Callable[[str], object]) -> Found:
    """Arguments as a JSON text. Some models write that text as a string, some null for none."""
    first = yield from source.peek()
    if first in ("{", "["):
        return (yield from read_value(source, emit))
    pieces: list[str] = []
    is_whole = yield from read_value(source, pieces.append)
    written = "".join(pieces)
    value = _decoded(written) if first == '"' and is_whole else None
    emit("{}" if written == "null" else written if value is None else value)
    return is_whole


def _string(source: Source) -> Generator[None, None, str | None]:
    """A JSON string's value; None if it is not one."""
    pieces: list[str] = []
    yield from _raw_string(source, pieces.append)
    return _decoded("".join(pieces))


def _decoded(written: str) -> str | None:
    try:
        value = json.loads(written, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _raw_string(source: Source, emit: Callable[[str], object]) -> Found:
    """Pass a string on as it is written, from its first quote to its last. False: the answer ended in it."""
    emit(source.take(1))
    while char := (yield from source.peek()):
        if char == '"':
            emit(source.take(1))
            return True
        if char == "\\":
            emit(source.take(len((yield from source.peek(2)))))
        else:
            emit(source.run(_IN_STRING))
    return False


def _ignore(_: str) -> None:
    """For values that mean nothing here."""


def read_tagged_call(source: Source, writer: Writer, marker: str) -> Found:
    """`read_call` behind a marker that says that a call comes: any name is one. False: all was written as text."""
    source.hold(marker)
    yield from source.spaces()
    if (yield from read_call(source, writer, bool)):
        return True
    writer.text(source.release())
    return False
