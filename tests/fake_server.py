"""servd's real HTTP front over a fake worker, in a thread: for clients that have, or start, an event loop of their own.

Knows nothing of clients. Tests that share the server's event loop use tests.api.http.serving.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from servd.api.http.app import start_http, stop_http
from servd.api.service import InferenceService
from servd.config import ServerConfig
from tests.fakes import FakeEngine


class FakeServer:
    """A server of the model "fake", whose tokens are bytes, on a free port, while the block runs."""

    def __init__(
        self,
        folder: Path,
        config: ServerConfig | None = None,
        *,
        settings: dict[str, Any] | None = None,
        **executor_options: Any,
    ) -> None:
        self._config = config or ServerConfig(port=0)
        self.fake = FakeEngine(folder, settings or {}, executor_options=executor_options)

    def __enter__(self) -> FakeServer:
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self.fake:
            runner, port = await start_http(InferenceService(self.fake.engine, "fake"), self._config)
            self.url = f"http://127.0.0.1:{port}"
            self._up.set()
            await self._stop.wait()
            await stop_http(runner)
