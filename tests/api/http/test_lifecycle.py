"""The server's states as a client sees them: health, overload, deadlines, drain, lost workers, start and stop."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from servd.api.http.app import start_http, stop_http
from servd.api.service import InferenceService
from servd.config import EngineConfig, ServerConfig
from servd.engine.async_engine import AsyncEngine
from servd.errors import ConfigError, WorkerDied
from servd.outputs import SchedulerOutput
from tests.api.http.serving import CHAT, COMPLETIONS, serve
from tests.fakes import FakeExecutor

LONG: dict[str, Any] = {"prompt": "long", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}


def test_health_version_and_metrics(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            health = await server.request("GET", "/health")
            assert (health.status, health.json()) == (200, {"state": "ready"})
            assert (await server.request("HEAD", "/health")).status == 200
            assert list((await server.request("GET", "/version")).json()) == ["version"]
            await server.post(COMPLETIONS, LONG | {"max_tokens": 3})
            metrics = await server.request("GET", "/metrics")
            assert metrics.headers["Content-Type"].startswith("text/plain; version=")
            assert b'servd_requests_finished_total{reason="length"} 1.0' in metrics.body
            for state in ("draining", "recovering", "dead"):
                server.engine.state = state
                health = await server.request("GET", "/health")
                assert (health.status, health.json()) == (503, {"state": state})
            server.engine.state = "ready"

    asyncio.run(main())


def test_a_full_queue_answers_429_with_retry_after(tmp_path: Path) -> None:
    async def main() -> None:
        settings = {"max_num_seqs": 1, "max_num_queued_reqs": 1}
        async with serve(tmp_path, settings=settings, step_delay=0.001) as server:
            first = asyncio.create_task(server.post(COMPLETIONS, LONG | {"max_tokens": 100}))
            await server.fake.wait_until(lambda: server.engine.stats().running == 1)
            second = asyncio.create_task(server.post(COMPLETIONS, LONG | {"max_tokens": 5}))
            await server.fake.wait_until(lambda: server.engine.stats().waiting == 1)
            for body in (LONG, LONG | {"stream": True}, LONG | {"prompt": ["a", "b"]}):
                reply = await server.post(COMPLETIONS, body)
                assert (reply.status, reply.headers["Retry-After"]) == (429, "1")
                assert reply.error()["type"] == "overloaded_error"
            assert server.engine.stats().waiting == 1, "a list of prompts is taken whole or not at all"
            assert [(await task).status for task in (first, second)] == [200, 200]

    asyncio.run(main())


def test_a_deadline_is_a_timeout_error_whole_and_streamed(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.005) as server:
            body = LONG | {"deadline_ms": 60}
            whole = await server.post(COMPLETIONS, body)
            assert (whole.status, whole.error()["type"]) == (408, "timeout_error")
            events = (await server.post(COMPLETIONS, body | {"stream": True})).events()
            assert events[0]["choices"][0]["text"]
            assert events[-1]["error"]["type"] == "timeout_error", "it ends in the error, without [DONE]"
            queued = await server.post(COMPLETIONS, body | {"n": 3, "prompt": ["a", "b"]})
            assert queued.status == 408
            soon = await server.post(COMPLETIONS, LONG | {"max_tokens": 2, "deadline_ms": 5000})
            assert soon.status == 200

    asyncio.run(main())


def test_drain_refuses_new_requests_finishes_some_and_aborts_the_rest_aloud(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.005) as server:
            short = asyncio.create_task(server.post(COMPLETIONS, LONG | {"max_tokens": 20}))
            whole = asyncio.create_task(server.post(COMPLETIONS, LONG))
            streamed = asyncio.create_task(server.post(COMPLETIONS, LONG | {"stream": True, "n": 2}))
            await server.fake.wait_until(lambda: server.engine.stats().running == 4)
            drain = asyncio.create_task(server.engine.drain(0.5))
            await asyncio.sleep(0)
            refused = await server.post(COMPLETIONS, LONG)
            assert (refused.status, refused.error()["type"]) == (503, "unavailable_error")
            assert (await server.request("GET", "/health")).json() == {"state": "draining"}
            await drain
            assert (await short).status == 200
            aborted = await whole
            assert (aborted.status, aborted.error()["type"]) == (503, "unavailable_error")
            events = (await streamed).events()
            assert events[-1]["error"]["type"] == "unavailable_error"
            assert events[-2]["choices"][0]["finish_reason"] is None

    asyncio.run(main())


def test_an_abort_from_elsewhere_is_never_passed_off_as_an_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.001) as server:
            bodies = [LONG, LONG | {"stream": True}]
            calls = [asyncio.create_task(server.post(COMPLETIONS, body)) for body in bodies]
            await server.fake.wait_until(lambda: server.engine.stats().running == 2)
            for answer_id in list(server.engine.core.scheduler.requests):
                server.engine.abort(answer_id.partition("#")[0])
            whole, streamed = [await call for call in calls]
            assert (whole.status, whole.error()["type"]) == (503, "unavailable_error")
            assert streamed.events()[-1]["error"]["type"] == "unavailable_error"

    asyncio.run(main())


def test_the_openai_client_sees_a_failure_in_mid_stream(tmp_path: Path) -> None:
    async def main() -> str:
        async with serve(tmp_path, step_delay=0.005) as server, server.openai() as client:
            stream = await client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "x"}], stream=True, extra_body={"deadline_ms": 50}
            )
            with pytest.raises(openai.APIError) as caught:
                async for _ in stream:
                    pass
            return caught.value.message

    assert "deadline" in asyncio.run(main())


def test_a_worker_that_dies_once_costs_a_stream_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        # With guesses the answer could be whole before the worker dies.
        async with serve(tmp_path, step_delay=0.001, settings={"num_speculative_tokens": 0}) as server:
            expected = (await server.post(COMPLETIONS, LONG | {"max_tokens": 300})).json()["choices"][0]["text"]
            stream = asyncio.create_task(server.post(COMPLETIONS, LONG | {"max_tokens": 300, "stream": True}))
            await server.fake.wait_until(lambda: server.engine.stats().running == 1)
            await asyncio.sleep(0.05)
            server.executor.die()
            events = (await stream).events()
            assert "".join(event["choices"][0]["text"] for event in events[:-1]) == expected
            assert server.executor.num_starts == 2

    asyncio.run(main())


def test_workers_that_keep_dying_end_every_stream_with_an_error(tmp_path: Path) -> None:
    def die(plan: SchedulerOutput) -> None:
        raise WorkerDied("killed")

    async def main() -> None:
        async with serve(tmp_path, settings={"max_worker_restarts": 1}, on_step=die) as server:
            server.executor.gate.clear()
            bodies = [LONG, LONG | {"stream": True}]
            calls = [asyncio.create_task(server.post(COMPLETIONS, body)) for body in bodies]
            stats = server.engine.stats
            await server.fake.wait_until(lambda: stats().running + stats().waiting == 2)
            server.executor.gate.set()
            whole, streamed = [await call for call in calls]
            assert (whole.status, whole.error()["code"]) == (503, "worker_died")
            assert [event["error"]["code"] for event in streamed.events()] == ["worker_died"]
            assert (await server.request("GET", "/health")).json() == {"state": "dead"}
            assert (await server.post(COMPLETIONS, LONG)).status == 503

    asyncio.run(main())


def test_a_request_that_fails_alone_is_a_500_and_its_mates_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.001) as server:
            step = server.executor._step

            def failing(plan: SchedulerOutput) -> Any:
                output = step(plan)
                for request_id, request in list(server.executor.requests.items()):
                    if request.prompt == "poison" and request_id in output.request_ids:
                        output.failed[request_id] = "injected"
                return output

            server.executor._step = failing  # type: ignore[method-assign]
            mate = asyncio.create_task(server.post(COMPLETIONS, LONG | {"max_tokens": 100}))
            whole = await server.post(COMPLETIONS, {"prompt": "poison"})
            assert (whole.status, whole.error()["code"]) == (500, "request_failed")
            streamed = await server.post(COMPLETIONS, {"prompt": ["poison", "fine"], "stream": True})
            assert streamed.events()[-1]["error"]["code"] == "request_failed"
            assert (await mate).json()["usage"]["completion_tokens"] == 100

    asyncio.run(main())


def test_a_port_in_use_is_a_config_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            service = InferenceService(server.engine, "fake")
            with pytest.raises(ConfigError, match=f"--port {server.port}"):
                await start_http(service, ServerConfig(port=server.port))

    asyncio.run(main())


def test_stop_closes_idle_connections_and_the_port(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            runner, port = await start_http(InferenceService(server.engine, "fake"), ServerConfig(port=0))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            async with asyncio.timeout(2):
                await stop_http(runner)
                await reader.read()
            writer.close()
            with pytest.raises(OSError, match="."):
                await asyncio.open_connection("127.0.0.1", port)

    asyncio.run(main())


def test_tokenize_and_detokenize(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            reply = (await server.post("/tokenize", {"prompt": "ab", "return_token_strs": True})).json()
            assert reply == {"count": 2, "max_model_len": 2048, "tokens": [97, 98], "token_strs": ["a", "b"]}
            chat = (await server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]})).json()
            assert bytes(chat["tokens"]).decode() == "user: x\nassistant: "
            usage = (await server.post(CHAT, {"messages": [{"role": "user", "content": "x"}]})).json()["usage"]
            assert usage["prompt_tokens"] == chat["count"]
            assert (await server.post("/detokenize", {"tokens": [97, 256]})).json() == {"prompt": "a<eos>"}
            assert (await server.post("/detokenize", {"tokens": []})).json() == {"prompt": ""}
            assert (await server.post("/tokenize", {"prompt": ""})).json()["tokens"] == []

    asyncio.run(main())


def test_the_front_imports_no_torch(tmp_path: Path) -> None:
    async def main() -> None:
        code = "import sys, servd.api.http.app as app; app.discover_routes(); print('torch' in sys.modules)"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
        )
        out, _ = await process.communicate()
        assert json.loads(out.decode().strip().lower()) is False

    asyncio.run(main())


def test_a_server_whose_engine_still_starts_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            starting = AsyncEngine(EngineConfig(), server.engine.files, executor=FakeExecutor(EngineConfig()))
            runner, port = await start_http(InferenceService(starting, "fake"), ServerConfig(port=0))
            server.port = port
            assert (await server.request("GET", "/health")).json() == {"state": "starting"}
            assert (await server.request("GET", "/v1/models")).status == 200
            assert (await server.request("GET", "/metrics")).status == 200
            for path, body in ((COMPLETIONS, LONG), (CHAT, {"messages": []}), ("/tokenize", {"prompt": "x"})):
                reply = await server.post(path, body)
                assert (reply.status, reply.error()["type"]) == (503, "unavailable_error")
            await stop_http(runner)
            await starting.close()

    asyncio.run(main())
