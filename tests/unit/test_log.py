"""Log lines: what a client sent cannot forge a line or move the cursor, also by way of an exception."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from servd.log import setup_logging


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the log writes to stderr."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    setup_logging("info")
    return stderr


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
