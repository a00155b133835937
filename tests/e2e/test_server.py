"""The server as its users meet it: real clients, clients that leave, bad input beside good, a killed worker."""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import aiohttp
import grpc
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc
from tests.e2e.conftest import Server, start_server

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


async def metrics(session: aiohttp.ClientSession, server: Server) -> dict[str, float]:
    async with session.get(f"{server.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def wait_idle(session: aiohttp.ClientSession, server: Server, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            now = await metrics(session, server)
            if now['servd_kv_blocks{state="used"}'] == 0 and now["servd_requests_running"] == 0:
                return
            await asyncio.sleep(0.02)


def test_the_printed_curl_works(server):
    output = subprocess.run(["bash", "-c", server.curl], capture_output=True, timeout=60, check=True).stdout
    assert "Paris" in ChatCompletion.model_validate(json.loads(output)).choices[0].message.content


def test_openai_client_sync(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == [MODEL]
    chat = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=20)
    assert chat.choices[0].message.content == "The capital of France is Paris."
    assert chat.choices[0].finish_reason == "stop"
    text = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=2)
    assert text.choices[0].text == " Paris."
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=20, stream=True
        )
    ]
    assert "".join(pieces) == chat.choices[0].message.content


def test_openai_client_async(server):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            whole = await client.completions.create(model=MODEL, prompt="One, two,", temperature=0, max_tokens=12)
            stream = await client.completions.create(
                model=MODEL, prompt="One, two,", temperature=0, max_tokens=12, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            chunks = [chunk async for chunk in stream]
            return whole, chunks

    whole, chunks = asyncio.run(main())
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 12


@contextlib.asynccontextmanager
async def being_answered(session, url, max_tokens):
    """A stream whose first token is there; how fast the rest comes is the machine's affair."""
    body = {"prompt": "a stream", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    async with session.post(f"{url}/v1/completions", json=body) as stream:
        await stream.content.readuntil(b"\n\n")
        yield stream


def test_a_short_request_finishes_before_a_long_one_that_started_first(server):
    async def main():
        async with aiohttp.ClientSession() as session, being_answered(session, server.url, 1500) as stream:
            long = asyncio.create_task(stream.read())
            body = {"prompt": "short", "max_tokens": 4, "ignore_eos": True}
            async with session.post(f"{server.url}/v1/completions", json=body) as response:
                Completion.model_validate(await response.json())
            assert not long.done()
            assert (await long).endswith(b"data: [DONE]\n\n")

    asyncio.run(main())


def test_the_step_log_shows_prompt_chunks_and_answers_together(server):
    async def main():
        async with aiohttp.ClientSession() as session, being_answered(session, server.url, 1500) as stream:
            body = {"prompt": "some words of a long prompt " * 120, "max_tokens": 4, "ignore_eos": True}
            async with session.post(f"{server.url}/v1/completions", json=body) as response:
                await response.read()
            await stream.read()

    asyncio.run(main())
    steps = [re.search(r"(\d+) prefill \+ (\d+) decode tokens", line) for line in server.log]
    assert any(int(step[1]) > 1 and int(step[2]) >= 1 for step in steps if step)


@pytest.mark.parametrize("way", ["http stream", "http whole", "grpc cancel", "grpc deadline"])
def test_a_client_that_leaves_frees_its_blocks(server, way):
    async def leave(session, stub, i):
        prompt = f"Tell me number {i} of"
        body = {"prompt": prompt, "max_tokens": 1500, "ignore_eos": True, "stream": way == "http stream"}
        if way.startswith("http"):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5 + 0.01 * (i % 7)):
                    async with session.post(f"{server.url}/v1/completions", json=body) as response:
                        await response.read()
            return
        params = pb.SamplingParams(max_tokens=1500, ignore_eos=True)
        request = pb.GenerateRequest(text=prompt, sampling_params=params)
        call = stub.Generate(request, timeout=0.4 if way == "grpc deadline" else None)
        try:
            async for _ in call:
                if way == "grpc cancel":
                    call.cancel()
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass

    async def main():
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            grpc.aio.insecure_channel(server.grpc_address) as channel,
        ):
            stub = inference_pb2_grpc.InferenceStub(channel)
            before = await metrics(session, server)
            await asyncio.gather(*(leave(session, stub, i) for i in range(50)))
            await wait_idle(session, server)
            after = await metrics(session, server)
        reasons = ('servd_requests_finished_total{reason="abort"}', 'servd_requests_finished_total{reason="deadline"}')
        return sum(after.get(reason, 0) - before.get(reason, 0) for reason in reasons)

    assert asyncio.run(main()) == 50


BAD_BODIES = {
    "unknown model": ({"model": "gpt-4", "prompt": "x"}, 404, "model"),
    "empty prompt": ({"prompt": ""}, 400, "prompt"),
    "too long": ({"prompt": "word " * 9000}, 400, "prompt"),
    "negative max_tokens": ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
    "NaN temperature": ('{"prompt": "x", "temperature": NaN}', 400, "temperature"),
    "wrong JSON": ('{"prompt": "x"', 400, None),
    "20 MB body": (json.dumps({"prompt": "x" * 20_000_000}), 413, None),
    "wrong type": ({"prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
    "top_p": ({"prompt": "x", "top_p": 1.5}, 400, "top_p"),
    "logit_bias": ({"prompt": "x", "logit_bias": {"49152": 1}}, 400, "logit_bias"),
    "token id": ({"prompt": [49152]}, 400, "prompt"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role"),
}


def test_bad_input_is_refused_by_name_while_a_canary_streams_on_unchanged(server):
    async def main():
        async with aiohttp.ClientSession() as session:

            async def canary():
                body = {"prompt": "The canary sings", "max_tokens": 80, "ignore_eos": True, "seed": 1}
                async with session.post(f"{server.url}/v1/completions", json=body) as response:
                    return (await response.json())["choices"][0]["text"]

            async def bad(name):
                body, status, param = BAD_BODIES[name]
                data = body if isinstance(body, str) else json.dumps(body)
                path = "chat/completions" if "messages" in data else "completions"
                async with session.post(f"{server.url}/v1/{path}", data=io.BytesIO(data.encode())) as response:
                    error = (await response.json())["error"]
                    assert set(error) == {"message", "type", "param", "code"}
                    assert (name, response.status, error["param"]) == (name, status, param)
                    assert param is None or param in error["message"]

            alone = await canary()
            watched = asyncio.create_task(canary())
            for name in BAD_BODIES:
                await bad(name)
            assert not watched.done()
            assert await watched == alone

    asyncio.run(main())


def worker_pids(server: Server) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


@pytest.fixture(scope="module")
def own_server(starter_files):
    """A server that tests of this module may hurt."""
    server = start_server("--dtype", "float32")
    yield server
    server.close()


def test_a_killed_worker_is_replaced_and_open_streams_go_on_with_the_same_tokens(own_server):
    async def ask(session, seed, started):
        body = {"prompt": "A long story:", "max_tokens": 120, "ignore_eos": True, "temperature": 0.8, "seed": seed,
                "stream": True}  # fmt: skip
        text = ""
        async with session.post(f"{own_server.url}/v1/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    started.set()
        return text

    async def main():
        async with aiohttp.ClientSession() as session:
            expected = await asyncio.gather(*(ask(session, seed, asyncio.Event()) for seed in range(4)))
            events = [asyncio.Event() for _ in range(4)]
            tasks = [asyncio.create_task(ask(session, seed, events[seed])) for seed in range(4)]
            await asyncio.gather(*(event.wait() for event in events))
            (worker,) = worker_pids(own_server)
            os.kill(worker, signal.SIGKILL)
            got = await asyncio.gather(*tasks)
            restarts = (await metrics(session, own_server))["servd_worker_restarts_total"]
            return expected, got, restarts

    expected, got, restarts = asyncio.run(main())
    assert got == expected
    assert restarts == 1


def test_a_worker_killed_while_idle_is_replaced_by_itself(own_server):
    async def main():
        async with aiohttp.ClientSession() as session:
            before = (await metrics(session, own_server))["servd_worker_restarts_total"]
            (worker,) = worker_pids(own_server)
            os.kill(worker, signal.SIGKILL)
            async with asyncio.timeout(20):
                while (await metrics(session, own_server))["servd_worker_restarts_total"] == before:
                    await asyncio.sleep(0.02)
                while (await session.get(f"{own_server.url}/health")).status != 200:
                    await asyncio.sleep(0.02)

    asyncio.run(main())
    assert len(worker_pids(own_server)) == 1


def test_sigterm_finishes_what_runs_and_leaves_no_process(own_server):
    async def main():
        async with aiohttp.ClientSession() as session:
            body = {"prompt": "Still here", "max_tokens": 60, "ignore_eos": True}

            async def ask():
                async with session.post(f"{own_server.url}/v1/completions", json=body) as response:
                    return response.status, (await response.json())["usage"]["completion_tokens"]

            task = asyncio.create_task(ask())
            await asyncio.sleep(0.5)
            own_server.process.send_signal(signal.SIGTERM)
            return await task

    workers = worker_pids(own_server)
    assert asyncio.run(main()) == (200, 60)
    assert own_server.process.wait(20) == 0
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "the worker outlived its server"
        time.sleep(0.05)


def test_a_taken_port_is_one_clear_line(server):
    port = server.url.rsplit(":", 1)[1]
    result = subprocess.run(
        [os.sys.executable, "-m", "servd.cli", "serve", "--port", port], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert port in line and "--port" in line


def test_a_missing_model_is_one_clear_line():
    result = subprocess.run(
        [os.sys.executable, "-m", "servd.cli", "serve", "/no/such/model", "--port", "0", "--grpc-port", "0"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "/no/such/model" in line
