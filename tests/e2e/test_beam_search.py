"""Beam search over the starter model in float32 finds the sequences of `transformers`; and over HTTP the same."""

import asyncio
from typing import Any

import aiohttp
import pytest

from servd import LLM, SamplingParams
from servd.hub import ModelFiles

PROMPTS = ["The capital of France is", "Water boils at", "def add(a, b):", "Once upon a time, a small fox"]
WIDTH, N, NEW_TOKENS = 4, 2, 16
SEARCH = SamplingParams(n=N, best_of=WIDTH, use_beam_search=True, max_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def prompt_ids(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def searched(starter_files: ModelFiles, prompt_ids: list[list[int]]) -> list[list[list[int]]]:
    with LLM(dtype="float32", kv_cache_memory=1 << 28, max_model_len=512) as llm:
        found = llm.generate(prompt_ids, SEARCH)
        alone = [llm.generate([ids], SEARCH)[0] for ids in prompt_ids[:2]]
    answers = [[answer.token_ids for answer in one.answers] for one in found]
    assert [[answer.token_ids for answer in one.answers] for one in alone] == answers[:2]
    return answers


def test_the_sequences_are_those_of_transformers(starter_files, prompt_ids, searched):
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.LlamaConfig.from_pretrained(starter_files.folder)
    model = transformers.LlamaForCausalLM(config).eval()
    parsed = load_gguf_checkpoint(starter_files.weights[0], return_tensors=True, model_to_load=model)
    model.load_state_dict(parsed["tensors"], strict=False)
    model.tie_weights()
    for ids, ours in zip(prompt_ids, searched, strict=True):
        found = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), do_sample=False,
            num_beams=WIDTH, num_return_sequences=N, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=0,
        )  # fmt: skip
        theirs = [sequence[len(ids) :] for sequence in found.tolist()]
        assert [answer + [0] * (len(theirs[0]) - len(answer)) for answer in ours] == theirs


def test_over_http(server, prompt_ids, searched):
    async def ask(session: aiohttp.ClientSession, ids: list[int]) -> list[list[int]]:
        body: dict[str, Any] = {
            "prompt": ids, "n": N, "best_of": WIDTH, "use_beam_search": True, "max_tokens": NEW_TOKENS,
            "return_token_ids": True,
        }  # fmt: skip
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            return [choice["token_ids"] for choice in (await response.json())["choices"]]

    async def main():
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(ask(session, ids) for ids in prompt_ids))

    assert asyncio.run(main()) == searched
