"""Log lines: one format, to stderr, with control characters of user input escaped."""

from __future__ import annotations

import logging
import sys


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        # A client must not be able to forge log lines or move the terminal's cursor.
        head, *rest = line.split("\n") if record.exc_info else [line]
        safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in head)
        return "\n".join([safe, *rest])


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
