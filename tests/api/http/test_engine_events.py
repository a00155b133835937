"""/v1/engine/events: what people see of the engine is what it does, and costs nothing when nobody looks."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from servd.api.http.context import ENGINE_FEED
from servd.config import ServerConfig
from servd.engine.observer import MAX_CELLS, MAX_LISTENERS, EngineView
from tests.api.http.serving import CHAT, COMPLETIONS, Served, serve

EVENTS = "/v1/engine/events"
Frame = dict[str, Any]


class Listener:
    """Reads events one by one; each must be the next in number, and an EngineView."""

    def __init__(self, response: Any) -> None:
        self.response = response
        self.num_events = 0

    async def next(self) -> Frame | None:
        async with asyncio.timeout(5):
            line = await self.response.content.readline()
            if not line:
                return None
            self.num_events += 1
            assert line == b"id: engine:%d\n" % self.num_events
            line = await self.response.content.readline()
            assert line.startswith(b"data: "), line
            assert await self.response.content.readline() == b"\n"
        msgspec.json.decode(line[6:], type=EngineView)
        return json.loads(line[6:])

    async def until(self, condition: Callable[[Frame], bool]) -> Frame:
        async with asyncio.timeout(10):
            while True:
                frame = await self.next()
                assert frame is not None, "the stream ended"
                if condition(frame):
                    return frame


@asynccontextmanager
async def listen(served: Served) -> AsyncIterator[Listener]:
    async with served.session.get(served.url + EVENTS) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        yield Listener(response)


def cells(frame: Frame) -> list[int]:
    data = base64.b64decode(frame["kv"]["map"])
    return [data[i // 4] >> 2 * (i % 4) & 3 for i in range(frame["kv"]["cells"])]


def test_a_running_request_is_seen_from_its_prompt_to_its_end(tmp_path: Path) -> None:
    async def main() -> None:
        settings = {"max_num_seqs": 1, "num_speculative_tokens": 0}
        async with serve(tmp_path, step_delay=0.005, settings=settings) as served, listen(served) as events:
            idle = await events.next()
            assert idle is not None
            assert (idle["state"], idle["model"], idle["num_running"], idle["steps"]) == ("ready", "fake", 0, [])
            assert (idle["kv"]["num_blocks"], set(cells(idle))) == (512, {0})
            body = {"prompt": "x" * 100, "max_tokens": 300, "ignore_eos": True}
            calls = [asyncio.create_task(served.post(COMPLETIONS, body)) for _ in range(2)]
            busy = await events.until(lambda f: f["running"] and f["running"][0]["output_tokens"] > 20 and f["steps"])
            (running,), (waiting,) = busy["running"], busy["waiting"]
            assert running["state"] == "decode" and running["prompt_tokens"] == 100 and running["age_seconds"] > 0
            assert waiting["state"] == "waiting" and waiting["output_tokens"] == 0
            step = busy["steps"][-1]
            assert step["parts"] == [[running["id"], 0, 1, 0, 0]] and step["milliseconds"] > 0
            assert cells(busy).count(2) == busy["kv"]["used"]
            ahead = busy["kv"]["used"] - -(-running["computed_tokens"] // 16)
            assert ahead in (0, 1)  # for the steps in flight
            assert busy["output_tokens_per_second"] > 0
            assert [reply.status for reply in await asyncio.gather(*calls)] == [200, 200]
            after = await events.until(lambda f: f["num_running"] == 0 and f["output_tokens"] == 600)
            assert after["time_to_first_token"]["counts"] != idle["time_to_first_token"]["counts"]
            assert sum(after["time_to_first_token"]["counts"]) == 2
            assert after["prompt_tokens"] == 200
            assert after["kv"]["used"] == 0 and cells(after).count(1) == after["kv"]["cached"] > 0

    asyncio.run(main())


def test_steps_come_once_each_and_in_order_with_their_prompt_chunks_and_drafts(tmp_path: Path) -> None:
    async def main() -> None:
        settings = {"num_speculative_tokens": 3, "max_num_batched_tokens": 64, "max_num_seqs": 4}
        async with serve(tmp_path, step_delay=0.005, settings=settings) as served, listen(served) as events:
            call = asyncio.create_task(served.post(COMPLETIONS, {"prompt": "y" * 150, "max_tokens": 60}))
            steps: list[Any] = []
            while not (call.done() and steps and sum(part[2] + part[3] for s in steps for part in s["parts"]) >= 59):
                frame = await events.next()
                assert frame is not None
                steps += frame["steps"]
            numbers = [step["step"] for step in steps]
            assert numbers == sorted(set(numbers))
            assert sum(part[1] for step in steps for part in step["parts"]) == 150
            assert [part[1] for part in steps[0]["parts"]] == [64]
            for step in steps:
                assert sum(part[1] for part in step["parts"]) == step["prefill_tokens"]
                assert sum(part[3] for part in step["parts"]) == step["accepted_tokens"]
            assert sum(step["accepted_tokens"] for step in steps) > 0

    asyncio.run(main())


def test_blocks_of_several_answers_show_as_shared(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.01) as served, listen(served) as events:
            body = {"messages": [{"role": "user", "content": "z" * 200}], "n": 3, "max_tokens": 900}
            call = asyncio.create_task(served.post(CHAT, body))
            frame = await events.until(lambda f: f["num_running"] == 3 and f["kv"]["shared"] > 0)
            assert cells(frame).count(3) == frame["kv"]["shared"] == 13  # of 16 tokens, of a prompt of 218
            call.cancel()

    asyncio.run(main())


def test_a_large_pool_is_drawn_small_and_nothing_used_is_lost(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.01, num_blocks=16001) as served, listen(served) as events:
            call = asyncio.create_task(served.post(COMPLETIONS, {"prompt": "x" * 160, "max_tokens": 1500}))
            frame = await events.until(lambda f: f["num_running"] == 1)
            assert frame["kv"]["cells"] <= MAX_CELLS
            assert frame["kv"]["blocks_per_cell"] == 4 and frame["kv"]["cells"] == 4000
            assert cells(frame).count(2) == -(-frame["kv"]["used"] // 4)
            call.cancel()

    asyncio.run(main())


def test_nothing_is_rendered_for_nobody_and_one_frame_serves_all(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as served:
            feed = served.runner.app[ENGINE_FEED]
            async with listen(served) as first, listen(served) as second:
                one, two = await first.next(), await second.next()
                assert one is not None and two is not None and feed.num_listeners == 2
                assert one["time"] == two["time"]
            await served.fake.wait_until(lambda: feed.num_listeners == 0)
            assert not [task for task in asyncio.all_tasks() if task.get_name() == "servd-engine-feed"]

    asyncio.run(main())


def test_one_listener_too_many_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as served:
            feed = served.runner.app[ENGINE_FEED]
            held = [feed.frames() for _ in range(MAX_LISTENERS)]
            for frames in held:
                await anext(frames)
            reply = await served.request("GET", EVENTS)
            assert (reply.status, reply.error()["code"]) == (429, "queue_full") and "64" in reply.error()["message"]
            assert int(reply.headers["Retry-After"]) >= 1
            for frames in held:
                await frames.aclose()
            async with listen(served) as events:
                assert await events.next() is not None

    asyncio.run(main())


def test_the_stream_ends_when_the_server_drains_and_shows_restarts_before(tmp_path: Path) -> None:
    async def main() -> None:
        settings = {"num_speculative_tokens": 0}
        async with serve(tmp_path, step_delay=0.005, settings=settings) as served, listen(served) as events:
            call = asyncio.create_task(served.post(COMPLETIONS, {"prompt": "x", "max_tokens": 500}))
            await events.until(lambda f: f["num_running"] == 1)
            served.executor.die()
            await events.until(lambda f: f["worker_restarts"] == 1)
            draining = asyncio.create_task(served.engine.drain(10))
            assert (await events.until(lambda f: f["state"] == "draining"))["num_running"] == 1
            assert (await call).status == 200
            while await events.next() is not None:
                pass
            await draining

    asyncio.run(main())


def test_it_wants_the_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=ServerConfig(port=0, api_key="secret")) as served:
            reply = await served.request("GET", EVENTS)
            assert (reply.status, reply.error()["code"]) == (401, "invalid_api_key")

    asyncio.run(main())
