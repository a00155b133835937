#!/usr/bin/env python3
"""A small HTTP front for OpenVINO GenAI's continuous batching: streaming /v1/completions over prompt token ids.
Runs in the peer's own environment, so it imports nothing of servd; it knows nothing of how it is measured.

Steps and HTTP take turns in one thread: step() holds the interpreter's lock, so that another thread would get its turn
late or not at all (at 32 requests: tokens in pairs), and another process would take a core from the engine."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]
from aiohttp import web
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

MAX_NUM_BATCHED_TOKENS = 512
# Of the event loop between two steps: from a closed answer over a new connection to the request in the pipeline.
TURNS = 8


class Stream:
    """One request's tokens on their way from the pipeline to its answer."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.tokens: asyncio.Queue[list[int] | None] = asyncio.Queue()  # None: no more will come

    def collect(self) -> bool:
        """Queue what the last step gave; whether more will come."""
        while self.handle.can_read():
            for output in self.handle.read().values():
                self.tokens.put_nowait(list(output.generated_ids))
        if self.handle.get_status() == openvino_genai.GenerationStatus.RUNNING:
            return True
        self.tokens.put_nowait(None)
        return False


class Engine:
    """The pipeline and its running requests."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = arguments.cache_gib
        scheduler.max_num_batched_tokens = MAX_NUM_BATCHED_TOKENS
        scheduler.max_num_seqs = arguments.max_num_seqs
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": arguments.threads, "INFERENCE_PRECISION_HINT": "bf16"}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(arguments.folder), scheduler, "CPU", properties)
        self.running: list[Stream] = []
        self.has_work = asyncio.Event()
        self.next_id = 0

    def add(self, prompt_token_ids: list[int], max_tokens: int, ignore_eos: bool) -> Stream:
        """Take in a request, greedy."""
        config = openvino_genai.GenerationConfig()
        config.set_eos_token_id(self.pipeline.get_config().eos_token_id)
        config.max_new_tokens = max_tokens
        config.ignore_eos = ignore_eos
        prompt = openvino.Tensor(numpy.array([prompt_token_ids], dtype=numpy.int64))
        stream = Stream(self.pipeline.add_request(self.next_id, prompt, config))
        self.next_id += 1
        self.running.append(stream)
        self.has_work.set()
        return stream

    async def run(self) -> None:
        """Step, then let the answers out and new requests in; sleep without work."""
        while True:
            await self.has_work.wait()
            self.pipeline.step()
            self.running = [stream for stream in self.running if stream.collect()]
            if not self.running:
                self.has_work.clear()
            for _ in range(TURNS):
                await asyncio.sleep(0)


class Front:
    """The HTTP handlers."""

    def __init__(self, model: str, tokenizer: Tokenizer, engine: Engine) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine

    async def health(self, request: web.Request) -> web.Response:
        """200: the pipeline is loaded."""
        return web.Response(text="ok")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """OpenAI's streaming completion, greedy, one chunk a token, usage in the last chunk."""
        body = await request.json()
        prompt = list(body["prompt"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        stream = self.engine.add(prompt, int(body["max_tokens"]), bool(body.get("ignore_eos", False)))
        decode, count = DecodeStream(skip_special_tokens=True), 0
        while (token_ids := await stream.tokens.get()) is not None:
            count += len(token_ids)
            text = "".join(decode.step(self.tokenizer, token_id) or "" for token_id in token_ids)
            await response.write(self._event([{"index": 0, "text": text, "finish_reason": None}]))
        await response.write(self._event([{"index": 0, "text": "", "finish_reason": "length"}]))
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": len(prompt) + count}
        await response.write(self._event([], usage=usage) + b"data: [DONE]\n\n")
        return response

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: %s\n\n" % json.dumps({"model": self.model, "choices": choices, **more}).encode()


async def serve(arguments: argparse.Namespace) -> None:
    """Load, then answer until the process is ended."""
    engine = Engine(arguments)
    front = Front(arguments.model, Tokenizer.from_file(str(arguments.folder / "tokenizer.json")), engine)
    app = web.Application(client_max_size=8 << 20)
    app.add_routes([web.get("/health", front.health), web.post("/v1/completions", front.completions)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", arguments.port).start()
    await engine.run()


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
