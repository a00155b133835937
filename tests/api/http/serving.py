"""A real HTTP server over a real engine over the fakes, for the tests of this folder."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
from aiohttp import web

from servd.api.http.app import start_http, stop_http
from servd.api.service import InferenceService
from servd.config import ServerConfig
from servd.engine.async_engine import AsyncEngine
from tests.fakes import ByteTokenizer, FakeEngine, FakeExecutor

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass
class Reply:
    status: int
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The error of a reply that has OpenAI's error shape, exactly."""
        assert self.headers["Content-Type"].startswith("application/json"), (self.headers, self.body)
        body = self.json()
        assert list(body) == ["error"], body
        assert list(body["error"]) == ["message", "type", "param", "code"], body
        assert isinstance(body["error"]["message"], str) and body["error"]["message"], body
        return body["error"]

    def events(self) -> list[Any]:
        """The SSE events of a streamed reply, whose ids count from 1; '[DONE]' stays a string."""
        assert self.headers["Content-Type"].startswith("text/event-stream"), (self.headers, self.body)
        assert self.body.endswith(b"\n\n"), self.body[-80:]
        events = []
        for number, event in enumerate(self.body.decode().split("\n\n")[:-1], start=1):
            id_line, data_line = event.split("\n")
            assert id_line.startswith("id: ") and id_line.endswith(f":{number}"), event
            assert data_line.startswith("data: "), event
            data = data_line.removeprefix("data: ")
            events.append(data if data == "[DONE]" else json.loads(data))
        return events


@dataclass
class Served:
    fake: FakeEngine
    session: aiohttp.ClientSession
    port: int
    runner: web.AppRunner

    def connections(self) -> int:
        """How many the server holds open."""
        assert self.runner.server is not None
        return len(self.runner.server.connections)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> AsyncEngine:
        return self.fake.engine

    @property
    def executor(self) -> FakeExecutor:
        return self.fake.executor

    async def request(self, method: str, path: str, **options: Any) -> Reply:
        async with self.session.request(method, self.url + path, **options) as response:
            return Reply(response.status, response.headers, await response.read())

    async def post(self, path: str, body: object, **options: Any) -> Reply:
        """`body` as it is if it is bytes or a file, else as JSON."""
        data = body if isinstance(body, (bytes, io.BytesIO)) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        return await self.request("POST", path, data=data, headers=headers, **options)

    async def raw(self, data: bytes, *, seconds: float = 5.0) -> bytes:
        """Send bytes, read until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            async with asyncio.timeout(seconds):
                await writer.drain()
                return await reader.read()
        finally:
            writer.close()

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def sync_openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@asynccontextmanager
async def serve(
    folder: Path,
    *,
    server: ServerConfig | None = None,
    settings: dict[str, Any] | None = None,
    max_position_embeddings: int = 2048,
    write_timeout: float = 60.0,
    body_timeout: float = 60.0,
    tokenizer: ByteTokenizer | None = None,
    **executor_options: Any,
) -> AsyncIterator[Served]:
    """A server on a free port, and a client session; on the way out nothing may still run or hold blocks."""
    fake = FakeEngine(folder, settings or {}, max_position_embeddings, executor_options, tokenizer or ByteTokenizer())
    async with fake:
        config = server or ServerConfig(port=0)
        service = InferenceService(
            fake.engine, "fake", tool_call_parser=config.tool_call_parser, reasoning_parser=config.reasoning_parser
        )
        runner, port = await start_http(service, config, write_timeout=write_timeout, body_timeout=body_timeout)
        try:
            async with aiohttp.ClientSession() as session:
                yield Served(fake, session, port, runner)
            if fake.engine.state == "ready":
                await fake.wait_idle()
        finally:
            await stop_http(runner)
