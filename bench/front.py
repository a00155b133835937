#!/usr/bin/env python3
"""Owns what the front process costs: processor time a streamed token with many streams, and of an idle server.
Does not know what the time goes into (bench/profile.py --concurrency 64)."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), str(ROOT / "kernels"), *sys.path]

from bench.peers.base import Start  # noqa: E402
from bench.peers.process import TICKS, free_port, running  # noqa: E402
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb  # noqa: E402
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc as pb_grpc  # noqa: E402

IDLE_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other flags go to `servd serve`.", allow_abbrev=False)
    parser.add_argument("--streams", type=int, default=64, metavar="N", help="at a time; default: 64")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="a stream; default: 200")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--grpc", action="store_true", help="streams of servd.v1 instead of HTTP")
    arguments, flags = parser.parse_known_args(argv)
    port = free_port()
    grpc_port = free_port() if arguments.grpc else -1
    command = [sys.executable, "-m", "servd.cli", "serve", "--port", str(port), "--grpc-port", str(grpc_port)]
    command += ["--log-level", "warning", *flags]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with running(Start(command, environment), port, log=None) as server:
        before = cpu_s(server.session)
        time.sleep(IDLE_SECONDS)
        idle = sum(cpu_s(server.session)) - sum(before)
        rounds = [
            asyncio.run(measure(server.session, server.url, grpc_port, arguments.streams, arguments.tokens))
            for _ in range(arguments.rounds)
        ]
    user, system, rate = (statistics.median(column) for column in zip(*rounds, strict=True))
    kind = "gRPC" if arguments.grpc else "HTTP"
    sys.stdout.write(
        f"front: {user + system:.1f} us of processor time a token ({user:.1f} user, {system:.1f} system), "
        f"{arguments.streams} {kind} streams, {rate:.0f} tokens/s in all, median of {arguments.rounds}; "
        f"idle: {100 * idle / IDLE_SECONDS:.2f} % of a core\n"
    )
    return 0


async def measure(
    process: int, url: str, grpc_port: int, num_streams: int, num_tokens: int
) -> tuple[float, float, float]:
    """Microseconds a token in user and system mode, and tokens/s, while all streams decode; grpc_port -1: by HTTP."""
    counts = [0] * num_streams
    read: Callable[[Any, int, list[int], int], Coroutine[Any, Any, None]]
    read = read_grpc if grpc_port >= 0 else read_http
    async with connected(url, grpc_port) as client:
        tasks = [asyncio.create_task(read(client, i, counts, num_tokens)) for i in range(num_streams)]
        while min(counts) < 2:
            await asyncio.sleep(0.01)
        began, first, (user, system) = time.perf_counter(), sum(counts), cpu_s(process)
        while max(counts) < num_tokens - 2:
            await asyncio.sleep(0.01)
        seconds, tokens, (user_after, system_after) = time.perf_counter() - began, sum(counts) - first, cpu_s(process)
        await asyncio.gather(*tasks)
    return 1e6 * (user_after - user) / tokens, 1e6 * (system_after - system) / tokens, tokens / seconds


def connected(url: str, grpc_port: int) -> AbstractAsyncContextManager[Any]:
    """What the streams are read with."""
    if grpc_port >= 0:
        return grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}")
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(None))


async def read_grpc(channel: grpc.aio.Channel, number: int, counts: list[int], num_tokens: int) -> None:
    """One stream of servd.v1; counts its tokens as they come."""
    stub = pb_grpc.InferenceStub(channel)
    params = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=1, seed=number)
    text = f"Tell me story number {number} of the sea."
    async for chunk in stub.Chat(
        pb.ChatRequest(messages=[pb.ChatMessage(role="user", content=text)], sampling_params=params)
    ):
        counts[number] += len(chunk.token_ids)


async def read_http(session: aiohttp.ClientSession, number: int, counts: list[int], num_tokens: int) -> None:
    """One stream; counts its tokens as they come."""
    body = {
        "messages": [{"role": "user", "content": f"Tell me story number {number} of the sea."}], "stream": True,
        "max_tokens": num_tokens, "ignore_eos": True, "temperature": 1, "seed": number, "return_token_ids": False,
        "stream_options": {"continuous_usage_stats": False},
    }  # fmt: skip
    async with session.post("/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                if b'"error"' in line:
                    raise RuntimeError(json.loads(line[6:])["error"]["message"])
                counts[number] += 1


def cpu_s(process: int) -> tuple[float, float]:
    """Seconds in user and system mode of this process alone, not of its workers."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / TICKS, int(fields[12]) / TICKS


if __name__ == "__main__":
    sys.exit(main())
