#!/usr/bin/env python3
"""A small HTTP front for OpenVINO GenAI's continuous batching: streaming /v1/completions over prompt token ids.
Runs in the peer's own environment, so it imports nothing of servd; it knows nothing of how it is measured.

The pipeline has a process of its own: its step() holds the interpreter's lock, and answers written by another thread
would wait for whole steps."""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MAX_NUM_BATCHED_TOKENS = 512
News = list[tuple[int, list[int] | None]]  # request id → its new tokens; None: no more will come


class Pipeline:
    """The engine, its requests by id, and the connection over which they come and their tokens go."""

    def __init__(self, arguments: argparse.Namespace, connection: Connection) -> None:
        import openvino_genai  # type: ignore[import-not-found]

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = arguments.cache_gib
        scheduler.max_num_batched_tokens = MAX_NUM_BATCHED_TOKENS
        scheduler.max_num_seqs = arguments.max_num_seqs
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": arguments.threads, "INFERENCE_PRECISION_HINT": "bf16"}
        self.genai = openvino_genai
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(arguments.folder), scheduler, "CPU", properties)
        self.connection = connection
        self.handles: dict[int, Any] = {}

    def run(self) -> None:
        """Admit what arrived, step, send all new tokens at once; sleep without work."""
        self.connection.send("ready")
        while True:
            while not self.handles or self.connection.poll():
                self.admit(*self.connection.recv())
            self.pipeline.step()
            self.connection.send(list(self.news()))

    def admit(self, request_id: int, prompt_token_ids: list[int], max_tokens: int, ignore_eos: bool) -> None:
        """Take in a request, greedy."""
        import numpy
        import openvino  # type: ignore[import-not-found]

        config = self.genai.GenerationConfig()
        config.set_eos_token_id(self.pipeline.get_config().eos_token_id)
        config.max_new_tokens = max_tokens
        config.ignore_eos = ignore_eos
        prompt = openvino.Tensor(numpy.array([prompt_token_ids], dtype=numpy.int64))
        self.handles[request_id] = self.pipeline.add_request(request_id, prompt, config)

    def news(self) -> Iterator[tuple[int, list[int] | None]]:
        """What the last step gave."""
        for request_id, handle in list(self.handles.items()):
            while handle.can_read():
                for output in handle.read().values():
                    yield request_id, list(output.generated_ids)
            if handle.get_status() != self.genai.GenerationStatus.RUNNING:
                yield request_id, None
                del self.handles[request_id]


def run_pipeline(arguments: argparse.Namespace, connection: Connection) -> None:
    """The engine's process, until the front is gone."""
    try:
        Pipeline(arguments, connection).run()
    except (EOFError, BrokenPipeError):
        sys.exit(0)


class Front:
    """The HTTP handlers, and the streams that the engine's tokens go to."""

    def __init__(self, model: str, tokenizer: Any, connection: Connection) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.connection = connection
        self.streams: dict[int, asyncio.Queue[list[int] | None]] = {}
        self.next_id = 0

    def read_engine(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: one wake-up of the loop a step."""
        try:
            while True:
                loop.call_soon_threadsafe(self.deliver, self.connection.recv())
        except (EOFError, RuntimeError):
            return  # the engine or the loop has ended

    def deliver(self, news: News) -> None:
        """Hand each stream its tokens."""
        for request_id, token_ids in news:
            self.streams[request_id].put_nowait(token_ids)

    async def health(self, request: Any) -> Any:
        """200: the pipeline is loaded."""
        from aiohttp import web

        return web.Response(text="ok")

    async def completions(self, request: Any) -> Any:
        """OpenAI's streaming completion, greedy, one chunk a token, usage in the last chunk."""
        from aiohttp import web
        from tokenizers.decoders import DecodeStream

        body = await request.json()
        prompt, request_id = list(body["prompt"]), self.next_id
        self.next_id += 1
        tokens = self.streams[request_id] = asyncio.Queue()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.connection.send((request_id, prompt, int(body["max_tokens"]), bool(body.get("ignore_eos", False))))
        decode, count = DecodeStream(skip_special_tokens=True), 0
        while (token_ids := await tokens.get()) is not None:
            count += len(token_ids)
            text = "".join(decode.step(self.tokenizer, token_id) or "" for token_id in token_ids)
            await response.write(self._event([{"index": 0, "text": text, "finish_reason": None}]))
        del self.streams[request_id]
        await response.write(self._event([{"index": 0, "text": "", "finish_reason": "length"}]))
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": len(prompt) + count}
        await response.write(self._event([], usage=usage) + b"data: [DONE]\n\n")
        return response

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: %s\n\n" % json.dumps({"model": self.model, "choices": choices, **more}).encode()


async def serve(arguments: argparse.Namespace, connection: Connection) -> None:
    """Answer until the process is ended."""
    from aiohttp import web
    from tokenizers import Tokenizer

    front = Front(arguments.model, Tokenizer.from_file(str(arguments.folder / "tokenizer.json")), connection)
    assert connection.recv() == "ready"
    threading.Thread(target=front.read_engine, args=(asyncio.get_running_loop(),), daemon=True).start()
    app = web.Application(client_max_size=8 << 20)
    app.add_routes([web.get("/health", front.health), web.post("/v1/completions", front.completions)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", arguments.port).start()
    await asyncio.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the OpenVINO IR with its tokenizer")
    parser.add_argument("--model", required=True, help="the name that clients use")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="compute threads")
    parser.add_argument("--cache-gib", type=int, default=2, help="memory of the KV cache [default: 2]")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="requests that run at once [default: 64]")
    arguments = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    processes.Process(target=run_pipeline, args=(arguments, theirs), daemon=True).start()
    theirs.close()
    asyncio.run(serve(arguments, ours))
    return 0


if __name__ == "__main__":
    sys.exit(main())
