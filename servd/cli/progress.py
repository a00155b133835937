"""Progress of what takes long, on stderr: bars on a terminal, a few plain lines elsewhere.

Knows nothing of what is being done.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

ProgressCallback = Callable[[str, int, int], None]  # what is being done, amount done, amount in all

PLAIN_STEP = 25  # percent between two plain lines


@contextmanager
def progress_display() -> Iterator[ProgressCallback]:
    """A callback that shows progress while the block runs; may be called from any thread."""
    if not sys.stderr.isatty():
        yield _plain_lines()
        return
    bars = _Bars()
    try:
        yield bars.show
    finally:
        bars.stop()


class _Bars:
    """One live bar at a time, gone from live display once full, so that log lines below it stay whole."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._what = ""
        self._lock = threading.Lock()

    def show(self, what: str, done: int, total: int) -> None:
        with self._lock:
            if what != self._what:
                self.stop()
                self._what, self._bar = what, _new_bar(what, total)
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=done, total=total)
                if done >= total:
                    self.stop()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _new_bar(what: str, total: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task(what, total=total)
    bar.start()
    return bar


def _plain_lines() -> ProgressCallback:
    last_shown: dict[str, int] = {}

    def show(what: str, done: int, total: int) -> None:
        percent = 100 * done // total if total else 100
        step = percent - percent % PLAIN_STEP
        if step > last_shown.get(what, -1):
            last_shown[what] = step
            sys.stderr.write(f"{what}: {step} %\n")

    return show
