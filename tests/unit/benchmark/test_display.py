"""What a terminal, and a log, show while a run goes on."""

from __future__ import annotations

import asyncio
import io
import sys

import pytest

from servd.benchmark import display
from servd.benchmark.client import LoadWatch


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_run_in_progress_is_shown_on_stderr(monkeypatch, is_terminal):
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.001)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    watch = LoadWatch(total=9, running=2, done=5, failed=1, ttfts_ms=[10.0, 20.0, 90.0])

    async def main() -> None:
        async with asyncio.timeout(10), display.live_display("c=8, 2 of 3", watch):
            while "TTFT" not in shown.getvalue():
                await asyncio.sleep(0.001)

    asyncio.run(main())
    for part in ("c=8, 2 of 3", "5/9 · 2 running · 1 failed", "TTFT p50 20 ms"):
        assert part in shown.getvalue()
