"""Ten thousand random and mutated bodies over all routes, beside a stream that must not change by a token.

Routes and body types are taken from the application, so that new ones are covered. The same seed, the same bodies.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import pkgutil
import random
import re
from collections import Counter, deque
from pathlib import Path
from typing import Any

import msgspec
import pytest

from servd.api.http import routes
from servd.api.http.app import create_app
from servd.api.service import InferenceService
from servd.config import ServerConfig
from tests.api.fuzzing import BodyMaker, types_of_module
from tests.api.http.serving import CHAT, COMPLETIONS, Served, serve

NUM_BODIES = 10_000
NUM_CLIENTS = 8
SECONDS_PER_CALL = 30.0  # none may hang
SETTINGS = {"max_model_len": 96, "max_num_queued_reqs": 100_000}
TENSOR = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["x"]}
MESSAGES = [{"role": "user", "content": "x"}]
LEAST: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x"},
    CHAT: {"messages": MESSAGES},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [65]},
    "/v1/embeddings": {"input": "x"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/responses": {"input": "x"},
    "/v1/responses/input_tokens": {"input": "x"},
    "/v1/prefixes": {"text": "x" * 40, "ttl_seconds": 1},
    "/v2/models/{model}/infer": {"inputs": [TENSOR]},
    "/v2/models/{model}/generate": {"text_input": "x"},
    "/v2/models/{model}/generate_stream": {"text_input": "x"},
}  # what gets past the first checks, where it is known
ID = re.compile(rb'"id": ?"([A-Za-z0-9._-]{1,80})"')
PATH_VALUES = ("fake", "fake", "fake", "nothing", "..%2f..%2fetc%2fpasswd", "%00", "a:b:c", "x" * 300, "%E2%98%83")
HEADERS: tuple[dict[str, str], ...] = (
    {}, {"Content-Type": "application/json"}, {"Content-Type": "text/plain; charset=utf-16"}, {"Accept": "x/y"},
    {"X-Request-Id": "a b"}, {"Last-Event-ID": "nothing-7"}, {"Content-Encoding": "gzip"}, {"Expect": "100-continue"},
    {"Inference-Header-Content-Length": "-1"}, {"Inference-Header-Content-Length": "5"}, {"Range": "bytes=-1"},
    {"Authorization": "Bearer x"}, {"Origin": "http://localhost:3000"},
)  # fmt: skip


def body_types() -> list[type[Any]]:
    """Of all routes: a route is also sent what others read."""
    found: list[type[Any]] = []
    for module in pkgutil.iter_modules(routes.__path__):
        found += types_of_module(importlib.import_module(f"{routes.__name__}.{module.name}"))
    return found


def endpoints(served: Served) -> list[tuple[str, str, list[type[Any]]]]:
    """Method, path and body types of every route of the application."""
    app = create_app(InferenceService(served.engine, "fake"), ServerConfig(port=0))
    found = []
    for route in app.router.routes():
        if route.resource is not None and route.method != "HEAD":
            module = importlib.import_module(route.handler.__module__)
            found.append((route.method, route.resource.canonical, types_of_module(module)))
    return found


class Fuzzer:
    """Sends the bodies, and keeps what came back."""

    def __init__(self, served: Served, seed: int) -> None:
        self.served = served
        self.make = BodyMaker(seed)
        self.random = random.Random(seed)
        self.endpoints = endpoints(served)
        self.all_types = body_types()
        self.statuses: Counter[int] = Counter()
        self.answered: set[str] = set()  # routes that took a body
        self.ids: deque[str] = deque(maxlen=8)  # of answers, prefixes and streams that were made a moment ago
        self.problems: list[str] = []

    async def send(self) -> None:
        """One call."""
        posts = [endpoint for endpoint in self.endpoints if endpoint[0] == "POST"]
        method, path, kinds = self.random.choice(posts if self.random.random() < 0.9 else self.endpoints)
        kind = self.random.choice(kinds if kinds and self.random.random() < 0.95 else self.all_types)
        route = f"{method} {path}"
        least = LEAST.get(path.replace("/versions/{version}", ""), {})
        body = self.make.body(kind, least) if method != "GET" else b""
        for name in [part for part in path.split("/") if part.startswith("{")]:
            values = [*PATH_VALUES, *self.ids] if name != "{version}" else ["1", "1", *PATH_VALUES]
            path = path.replace(name, self.random.choice(values))
        headers = {} if self.random.random() < 0.7 else self.random.choice(HEADERS)
        shown = f"{method} {path} {headers} {body[:2000]!r}"
        try:
            async with asyncio.timeout(SECONDS_PER_CALL):
                status, text = await self._call(method, path, headers, body)
        except TimeoutError:
            self.problems.append(f"no answer in {SECONDS_PER_CALL:g} s: {shown}")
            return
        self.statuses[status] += 1
        if status == 200:
            self.answered.add(route)
            self.ids += [found.decode() for found in ID.findall(text)]
        if status >= 500 or b"Traceback" in text or b"site-packages" in text:
            self.problems.append(f"{status} {text[:500]!r}: {shown}")

    async def _call(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        url = self.served.url + path
        async with self.served.session.request(method, url, data=body, headers=headers) as reply:
            endless = method == "GET" and reply.content_type == "text/event-stream"
            text = await (reply.content.readany() if endless else reply.read())
            if reply.content_type == "text/event-stream" and b'"server_error"' in text:
                return 500, text
            return reply.status, text


async def canary(server: Served) -> str:
    body = {"prompt": "canary", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
    events = (await server.post(COMPLETIONS, body)).events()
    return "".join(event["choices"][0]["text"] for event in events[:-1])


def test_no_body_does_harm(tmp_path: Path) -> None:
    async def main() -> None:
        config = ServerConfig(port=0, max_body_bytes=200_000)
        async with serve(tmp_path, server=config, settings=SETTINGS) as server:
            server.session.cookie_jar.clear()
            expected = await canary(server)
            fuzzer = Fuzzer(server, seed=20260)
            done = asyncio.Event()

            async def client(num_bodies: int) -> None:
                for _ in range(num_bodies):
                    await fuzzer.send()

            async def sing() -> int:
                songs = 0
                while not done.is_set():
                    assert await canary(server) == expected
                    songs += 1
                return songs

            beside = asyncio.create_task(sing())
            await asyncio.gather(*(client(NUM_BODIES // NUM_CLIENTS) for _ in range(NUM_CLIENTS)))
            done.set()
            assert not fuzzer.problems, f"{len(fuzzer.problems)}:\n" + "\n".join(fuzzer.problems[:10])
            assert await beside > 3
            assert fuzzer.statuses[200] > NUM_BODIES // 50, fuzzer.statuses
            assert fuzzer.statuses[400] > NUM_BODIES // 10, fuzzer.statuses
            wanted = {f"POST {path}" for method, path, _ in fuzzer.endpoints if method == "POST" and path in LEAST}
            assert fuzzer.answered >= wanted, "bodies of these were all refused: they are fuzzed in name only"
            assert await canary(server) == expected
            for pin in json.loads((await server.request("GET", "/v1/prefixes")).body).get("data", []):
                await server.request("DELETE", f"/v1/prefixes/{pin['id']}")
            await server.fake.wait_idle()
            assert server.executor.num_starts == 1 and server.engine.state == "ready"

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(2))
def test_bytes_that_are_nearly_http(tmp_path: Path, seed: int) -> None:
    """Heads with bytes changed: a 4xx, a normal answer, or none; the server goes on."""
    heads = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n" b'{"prompt": "x"}',
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: abc\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'f\r\n{"prompt": "x"}\r\n0\r\n\r\n',
    )
    make = BodyMaker(seed)
    answers: list[bytes] = []

    async def send(port: int, data: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            async with asyncio.timeout(0.5):  # for more of a head that was cut short, the server waits longer
                answers.append(await reader.read(100))
        except (TimeoutError, ConnectionError):
            answers.append(b"")
        finally:
            writer.close()

    async def main() -> None:
        async with serve(tmp_path, body_timeout=0.2) as server:
            for _ in range(10):
                await asyncio.gather(*(send(server.port, make.mutated(make.random.choice(heads))) for _ in range(60)))
            assert (await server.post(COMPLETIONS, {"prompt": "x"})).status == 200

    asyncio.run(main())
    statuses = Counter(answer[9:12] for answer in answers)
    assert not [status for status in statuses if status.startswith(b"5")], answers
    assert statuses[b"200"] > 10 and statuses[b"400"] > 100, statuses


def test_the_maker_reaches_every_field() -> None:
    """A type whose fields are never made would be fuzzed in name only."""
    for kind in body_types():
        info = msgspec.inspect.type_info(kind)
        make, seen = BodyMaker(1), set()
        for _ in range(400):
            value = make.of_type(info, 0)
            seen |= set(value) if isinstance(value, dict) else set()
        assert seen >= {field.encode_name for field in getattr(info, "fields", ())}, kind


