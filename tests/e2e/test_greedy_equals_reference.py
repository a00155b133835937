"""Greedy answers in float32 are those of `transformers`, token for token, on every way into the engine."""

import asyncio

import aiohttp
import grpc

from servd import LLM, SamplingParams
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc
from tests.e2e.conftest import NEW_TOKENS

GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


def test_offline_one_at_a_time(alone, reference):
    assert alone == reference


def test_offline_in_one_batch(prompt_ids, reference):
    with LLM(dtype="float32", kv_cache_memory=1 << 29, max_model_len=2048) as llm:
        assert [one.answers[0].token_ids for one in llm.generate(prompt_ids, GREEDY)] == reference


def test_over_http(server, prompt_ids, reference):
    async def ask(session, ids):
        body = {"prompt": ids, "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            return (await response.json())["choices"][0]["token_ids"]

    async def main():
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(ask(session, ids) for ids in prompt_ids))

    assert asyncio.run(main()) == reference


def test_over_grpc(server, prompt_ids, reference):
    async def ask(stub, ids):
        params = pb.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling_params=params)
        return [token_id async for chunk in stub.Generate(request) for token_id in chunk.token_ids]

    async def main():
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            return await asyncio.gather(*(ask(stub, ids) for ids in prompt_ids))

    assert asyncio.run(main()) == reference
