#!/usr/bin/env python3
"""A small HTTP front for OpenVINO GenAI's continuous batching: streaming /v1/completions over prompt token ids.
Runs in the peer's own environment, so it imports nothing of servd; it knows nothing of how it is measured."""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]
from aiohttp import web
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


@dataclass
class Stream:
    """One request between the HTTP handler and the thread that steps the pipeline."""

    prompt_token_ids: list[int]
    max_tokens: int
    ignore_eos: bool
    tokens: asyncio.Queue[list[int] | None] = field(default_factory=asyncio.Queue)  # None: no more will come
    handle: Any = None


class Stepper(threading.Thread):
    """Owns the pipeline: admits what arrived, steps, and hands all new tokens over in one wake-up a step."""

    def __init__(self, pipeline: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(daemon=True)
        self.pipeline = pipeline
        self.eos_token_id = pipeline.get_config().eos_token_id
        self.loop = loop
        self.arrivals: queue.SimpleQueue[Stream] = queue.SimpleQueue()
        self.running: list[Stream] = []
        self.next_id = 0

    def run(self) -> None:
        """Sleep without work; an arrival wakes the thread."""
        while True:
            if not self.running:
                self._admit(self.arrivals.get())
            while not self.arrivals.empty():
                self._admit(self.arrivals.get())
            self.pipeline.step()
            self.loop.call_soon_threadsafe(self._deliver, self._collect())

    def _admit(self, stream: Stream) -> None:
        config = openvino_genai.GenerationConfig()
        config.set_eos_token_id(self.eos_token_id)
        config.max_new_tokens = stream.max_tokens
        config.ignore_eos = stream.ignore_eos
        config.do_sample = False
        prompt = openvino.Tensor(numpy.array([stream.prompt_token_ids], dtype=numpy.int64))
        stream.handle = self.pipeline.add_request(self.next_id, prompt, config)
        self.next_id += 1
        self.running.append(stream)

    def _collect(self) -> list[tuple[Stream, list[int] | None]]:
        news: list[tuple[Stream, list[int] | None]] = []
        for stream in list(self.running):
            while stream.handle.can_read():
                news.extend((stream, list(output.generated_ids)) for output in stream.handle.read().values())
            if stream.handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                news.append((stream, None))
                self.running.remove(stream)
        return news

    @staticmethod
    def _deliver(news: list[tuple[Stream, list[int] | None]]) -> None:
        for stream, token_ids in news:
            stream.tokens.put_nowait(token_ids)


class Front:
    """The HTTP handlers."""

    def __init__(self, model: str, tokenizer: Tokenizer, stepper: Stepper) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stepper = stepper

    async def health(self, request: web.Request) -> web.Response:
        """200: the pipeline is loaded."""
        return web.Response(text="ok")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """OpenAI's streaming completion, greedy, one chunk a token, usage in the last chunk."""
        body = await request.json()
        stream = Stream(list(body["prompt"]), int(body["max_tokens"]), bool(body.get("ignore_eos", False)))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.stepper.arrivals.put(stream)
        decode, count = DecodeStream(skip_special_tokens=True), 0
        while (token_ids := await stream.tokens.get()) is not None:
            count += len(token_ids)
            text = "".join(decode.step(self.tokenizer, token_id) or "" for token_id in token_ids)
            await response.write(self._event([{"index": 0, "text": text, "finish_reason": None}]))
        await response.write(self._event([{"index": 0, "text": "", "finish_reason": "length"}]))
        prompt_tokens = len(stream.prompt_token_ids)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}
        await response.write(self._event([], usage=usage) + b"data: [DONE]\n\n")
        return response

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: %s\n\n" % json.dumps({"model": self.model, "choices": choices, **more}).encode()


def make_pipeline(arguments: argparse.Namespace) -> Any:
    """Continuous batching with prefix caching, chunked prefill, and compute threads as asked for."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = arguments.cache_gib
    scheduler.max_num_batched_tokens = 512
    scheduler.max_num_seqs = arguments.max_num_seqs
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True
    properties = {"INFERENCE_NUM_THREADS": arguments.threads, "INFERENCE_PRECISION_HINT": "bf16"}
    return openvino_genai.ContinuousBatchingPipeline(str(arguments.folder), scheduler, "CPU", properties)


async def serve(arguments: argparse.Namespace) -> None:
    """Load, then answer until the process is ended."""
    stepper = Stepper(make_pipeline(arguments), asyncio.get_running_loop())
    stepper.start()
    front = Front(arguments.model, Tokenizer.from_file(str(arguments.folder / "tokenizer.json")), stepper)
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
    asyncio.run(serve(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
