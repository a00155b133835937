"""A real server over the starter model, and what `transformers` says about the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from servd import LLM, SamplingParams
from servd.engine.tokenizer import Tokenizer
from servd.hub import ModelFiles
from tests.e2e.prompts import PROMPTS

NEW_TOKENS = 64


@pytest.fixture(scope="session")
def tokenizer(starter_files: ModelFiles) -> Tokenizer:
    return Tokenizer.from_files(starter_files)


@pytest.fixture(scope="session")
def prompt_ids(tokenizer: Tokenizer) -> list[list[int]]:
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert 1400 < len(ids[-1]) < 1700
    return ids


@pytest.fixture(scope="session")
def alone(starter_files: ModelFiles, prompt_ids: list[list[int]]) -> list[list[int]]:
    """Our own greedy answers, one prompt at a time, in float32."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(dtype="float32", kv_cache_memory=1 << 28, max_model_len=2048) as llm:
        return [llm.generate(ids, params)[0].answers[0].token_ids for ids in prompt_ids]


@pytest.fixture(scope="session")
def reference(
    starter_files: ModelFiles, prompt_ids: list[list[int]], alone: list[list[int]]
) -> list[list[int]]:
    """What `transformers`, which reads the same GGUF by itself, takes for the likeliest token at each place.

    One forward pass over prompt and answer: if all its choices equal the answer, then so does its own greedy answer.
    """
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.LlamaConfig.from_pretrained(starter_files.folder)
    model = transformers.LlamaForCausalLM(config).eval()
    parsed = load_gguf_checkpoint(starter_files.weights[0], return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(parsed["tensors"], strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # the head is tied
    model.tie_weights()
    choices = []
    with torch.inference_mode():
        for ids, answer in zip(prompt_ids, alone, strict=True):
            logits = model(torch.tensor([ids + answer[:-1]]), logits_to_keep=NEW_TOKENS).logits
            choices.append(logits[0].argmax(-1).tolist())
    return choices


@dataclass
class Server:
    """A `servd serve` process that is ready."""

    process: subprocess.Popen[str]
    url: str
    curl: str
    grpc_address: str
    log: list[str]  # lines of stderr so far
    reader: threading.Thread  # fills the log

    def close(self, seconds: float = 30) -> int:
        """SIGTERM if it still runs; returns the exit code."""
        assert self.process.stdout is not None
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.reader.join()


def start_server(*flags: str, env: dict[str, str] | None = None) -> Server:
    process = subprocess.Popen(
        [sys.executable, "-m", "servd.cli", "serve", "--port", "0", "--grpc-port", "0",
         "--kv-cache-memory", "512MiB", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    log: list[str] = []

    def read_log() -> None:
        with process.stderr as lines:
            for line in lines:
                log.append(line.rstrip("\n"))

    reader = threading.Thread(target=read_log, daemon=True)
    reader.start()
    lines = [process.stdout.readline().strip() for _ in range(3)]  # nothing else is printed there
    server = Server(process, lines[0], lines[1], lines[2].removeprefix("gRPC "), log, reader)
    if not all(lines):
        server.close()
        raise AssertionError(f"the server did not start: {log}")
    return server


@pytest.fixture(scope="session")
def server(starter_files: ModelFiles) -> Iterator[Server]:
    """The starter model in float32; shared, so tests leave it as they found it."""
    server = start_server("--dtype", "float32", "--log-steps", "--max-num-batched-tokens", "128")
    yield server
    server.close()
