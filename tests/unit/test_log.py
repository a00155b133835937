"""Log lines: what a client sent cannot forge a line or move the cursor, also by way of an exception."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from servd.log import setup_logging


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the log writes to stderr."""
    loggers = [logging.getLogger(name) for name in ("servd", "servd_kernels")]
    before = [(log, log.handlers, log.level, log.propagate) for log in loggers]
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    setup_logging("info")
    yield stderr
    for log, handlers, level, propagate in before:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def test_control_characters_are_escaped(shown: io.StringIO) -> None:
    logging.getLogger("servd.x").info("model %s", "a\x1b[2J\n12:00:00 E servd: forged")
    assert "\x1b" not in shown.getvalue()
    assert shown.getvalue().count("\n") == 1


def test_those_of_an_exception_too(shown: io.StringIO) -> None:
    try:
        raise ValueError("bad \x1b[2J\r text")
    except ValueError:
        logging.getLogger("servd.x").exception("request %s failed", "a\nb")
    lines = shown.getvalue().split("\n")
    assert "request a\\nb failed" in lines[0]
    assert lines[1] == "Traceback (most recent call last):"
    assert "ValueError: bad \\x1b[2J\\r text" in lines
