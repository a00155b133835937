"""SIGTERM and SIGHUP as an exception, where a command has started another process that must end with it.

Knows nothing of these processes.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block SIGTERM and a closed terminal raise SystemExit, so that its `finally` clauses run.

    Not for a block that runs uvloop: it does not survive an exception from a signal handler.
    """
    # Under nohup SIGHUP is ignored, and stays so.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
