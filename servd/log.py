"""Log lines: one format, to stderr, with control characters of user input escaped."""

from __future__ import annotations

import logging
import sys
from typing import Any


class _Formatter(logging.Formatter):
    # A client must not be able to forge log lines or move the terminal's cursor, nor by way of an exception's text.
    def formatMessage(self, record: logging.LogRecord) -> str:
        return _printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(_printable, super().formatException(ei).split("\n")))


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def setup_logging(level: str) -> None:
    """Send servd's log lines of `level` and above to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger("servd")
    root.handlers = [handler]
    root.setLevel(level.upper())
    root.propagate = False
    kernels = logging.getLogger("servd_kernels")
    kernels.handlers = [handler]
    kernels.setLevel(level.upper())
    kernels.propagate = False
