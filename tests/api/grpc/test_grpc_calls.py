"""The calls of servd.v1.Inference give what the engine made, token for token, field for field."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import servd
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc.convert import sampling_params_from, with_guidance
from servd.engine import guidance
from servd.sampling_params import SamplingParams
from tests.api.grpc.grpc_helpers import MODEL, run, served, text_of

INTERNAL = {"guidance", "pooling", "shown_special_token_ids"}  # fields that other fields of a request become
REPLIES = {"capital": "Paris – 🗼!", "story": "Once. STOP here", "assistant:": "I am fine."}


@pytest.mark.parametrize("runner", [run, lambda test: asyncio.run(test())], ids=["uvloop", "asyncio"])
def test_generate_streams_chunks_that_join_to_the_answer(tmp_path: Path, runner: object) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"replies": REPLIES}) as s:
            chunks = [chunk async for chunk in s.generate("The capital?", max_tokens=50)]
            assert "".join(chunk.text for chunk in chunks) == "Paris – 🗼!"
            assert bytes(i for chunk in chunks for i in chunk.token_ids if i < 256).decode() == "Paris – 🗼!"
            assert all("\ufffd" not in chunk.text for chunk in chunks)
            assert {chunk.request_id for chunk in chunks} == {chunks[0].request_id} != {""}
            assert {chunk.model for chunk in chunks} == {MODEL}
            *before, last = chunks
            assert all(chunk.finish_reason == pb.FINISH_REASON_UNSPECIFIED for chunk in before)
            assert not any(chunk.HasField("usage") for chunk in before)
            assert last.finish_reason == pb.FINISH_REASON_STOP
            assert last.WhichOneof("stop_reason") is None
            assert last.usage.prompt_tokens == len("The capital?")
            assert last.usage.completion_tokens == len("Paris – 🗼!".encode()) + 1

    runner(test)  # type: ignore[operator]


def test_a_prompt_of_token_ids_is_the_same_as_its_text(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            greedy = pb.SamplingParams(temperature=0.0, max_tokens=9)
            ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=list(b"Hello")), sampling_params=greedy)
            text = pb.GenerateRequest(text="Hello", model=MODEL, add_special_tokens=False, sampling_params=greedy)
            assert await text_of(s.stub.Generate(ids)) == await text_of(s.stub.Generate(text)) != ""

    run(test)


def test_max_tokens_defaults_to_16_for_generate_and_to_the_context_for_chat(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, max_position_embeddings=100) as s:
            assert len(await text_of(s.stub.Generate(pb.GenerateRequest(text="Hello")))) == 16
            request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Hi")])
            chunks = [chunk async for chunk in s.stub.Chat(request)]
            assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
            usage = chunks[-1].usage
            assert usage.prompt_tokens + usage.completion_tokens == 100

    run(test)


def test_a_prompt_can_be_cut_to_its_last_tokens(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, max_position_embeddings=32) as s:
            params = pb.SamplingParams(temperature=0.0, max_tokens=12)
            last = pb.GenerateRequest(text="tokens", sampling_params=params)
            cut = pb.GenerateRequest(text="its last tokens", sampling_params=params, truncate_prompt_tokens=6)
            assert await text_of(s.stub.Generate(cut)) == await text_of(s.stub.Generate(last))
            for request in (
                pb.GenerateRequest(text="x" * 31, sampling_params=params, truncate_prompt_tokens=-1),
                pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=[65] * 100), sampling_params=params, truncate_prompt_tokens=-1
                ),
            ):
                chunks = [chunk async for chunk in s.stub.Generate(request)]
                assert chunks[-1].usage.prompt_tokens == 20
                assert chunks[-1].usage.completion_tokens == 12

    run(test)


def test_the_best_answers_and_beams_come_at_the_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            for sampling in ({"best_of": 3, "seed": 1}, {"use_beam_search": True, "best_of": 3, "temperature": 0.0}):
                chunks = [chunk async for chunk in s.generate(n=2, max_tokens=5, **sampling)]
                assert sorted(chunk.index for chunk in chunks) == [0, 1]
                assert all(chunk.usage.completion_tokens == 5 for chunk in chunks)
            await s.fake.wait_idle()

    run(test)


def test_n_answers_are_told_apart(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            texts = ["", "", ""]
            finished = []
            async for chunk in s.generate(n=3, max_tokens=8, seed=5):
                texts[chunk.index] += chunk.text
                if chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
                    finished.append(chunk.index)
            assert sorted(finished) == [0, 1, 2]
            assert [len(text) for text in texts] == [8, 8, 8]
            assert len(set(texts)) == 3

    run(test)


def test_stop_text_and_stop_token_are_reported(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"replies": REPLIES}) as s:
            chunks = [chunk async for chunk in s.generate("story", stop=["STOP", "never"], max_tokens=50)]
            assert "".join(chunk.text for chunk in chunks) == "Once. "
            assert chunks[-1].stop_text == "STOP"
            chunks = [chunk async for chunk in s.generate("story", stop_token_ids=[ord("S")], max_tokens=50)]
            assert chunks[-1].stop_token_id == ord("S")
            assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP

    run(test)


def test_logprobs_of_answer_and_prompt(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            chunks = [chunk async for chunk in s.generate("abc", logprobs=2, prompt_logprobs=1, max_tokens=4)]
            token_ids = [i for chunk in chunks for i in chunk.token_ids]
            entries = [entry for chunk in chunks for entry in chunk.logprobs]
            assert [entry.token_id for entry in entries] == token_ids
            assert [entry.token for entry in entries] == [chr(i) for i in token_ids]
            assert all(entry.logprob == -0.5 and entry.rank == 1 for entry in entries)
            assert [top.token_id for top in entries[0].top_logprobs] == [token_ids[0], token_ids[0] + 1]
            prompt_entries = [entry for chunk in chunks for entry in chunk.prompt_logprobs]
            assert [entry.token for entry in prompt_entries] == ["b", "c"]

    run(test)


def test_chat_renders_the_template(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"replies": REPLIES}) as s:
            request = pb.ChatRequest(
                model=MODEL,
                messages=[
                    pb.ChatMessage(role="developer", content="Be brief."),
                    pb.ChatMessage(role="user", content="You?"),
                ],
            )
            chunks = [chunk async for chunk in s.stub.Chat(request)]
            assert "".join(chunk.text for chunk in chunks) == "I am fine."
            assert chunks[-1].usage.prompt_tokens == len("system: Be brief.\nuser: You?\nassistant: ")
            request.add_generation_prompt = False
            request.chat_template_kwargs.update({"thinking": True})
            request.sampling_params.max_tokens = 1
            chunks = [chunk async for chunk in s.stub.Chat(request)]
            assert chunks[-1].usage.prompt_tokens == len('[{"thinking": true}]\nsystem: Be brief.\nuser: You?\n')

    run(test)


def test_tokenize_and_detokenize_are_inverse(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, max_position_embeddings=64) as s:
            for text in ("", "naïve 🦊"):
                tokens = await s.stub.Tokenize(pb.TokenizeRequest(text=text))
                assert list(tokens.token_ids) == list(text.encode())
                assert tokens.max_model_len == 64
                assert (await s.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))).text == text
            special = pb.DetokenizeRequest(token_ids=[65, 256])
            assert (await s.stub.Detokenize(special)).text == "A<eos>"
            special.skip_special_tokens = True
            assert (await s.stub.Detokenize(special)).text == "A"

    run(test)


def test_models_and_status(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, max_position_embeddings=256, executor_options={"num_blocks": 33}) as s:
            (model,) = (await s.stub.ListModels(pb.ListModelsRequest())).models
            assert (model.name, model.max_model_len) == (MODEL, 256)
            assert model.created > 1_700_000_000
            s.fake.executor.gate.clear()
            call = s.generate(max_tokens=4)
            await s.fake.wait_until(lambda: s.fake.engine.stats().running == 1)
            status = await s.stub.GetStatus(pb.GetStatusRequest())
            assert (status.state, status.version) == (pb.ENGINE_STATE_READY, servd.__version__)
            assert (status.requests_running, status.requests_waiting, status.kv_blocks_used) == (1, 0, 1)
            assert status.kv_blocks_used + status.kv_blocks_cached + status.kv_blocks_free == 32
            assert status.block_size == 16
            s.fake.executor.gate.set()
            assert len(await text_of(call)) == 4

    run(test)


def test_every_sampling_field_reaches_the_engine() -> None:
    message = pb.SamplingParams(
        n=2, max_tokens=3, min_tokens=1, temperature=0.3, top_p=0.7, top_k=5, min_p=0.1, presence_penalty=0.5,
        frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias={7: -1.5}, stop=["a"], stop_token_ids=[9],
        include_stop_str_in_output=True, ignore_eos=True, seed=-4, logprobs=0, prompt_logprobs=2,
        skip_special_tokens=False, allowed_token_ids=[3, 5], bad_words=["b"], best_of=4, use_beam_search=True,
        length_penalty=0.5, early_stopping=pb.EARLY_STOPPING_NEVER,
    )  # fmt: skip
    assert {field.name for field, _ in message.ListFields()} == set(SamplingParams.__struct_fields__) - INTERNAL
    assert sampling_params_from(message, {}, max_tokens=16) == SamplingParams(
        n=2, max_tokens=3, min_tokens=1, temperature=0.3, top_p=0.7, top_k=5, min_p=0.1, presence_penalty=0.5,
        frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias={7: -1.5}, stop=("a",), stop_token_ids=(9,),
        include_stop_str_in_output=True, ignore_eos=True, seed=-4, logprobs=0, prompt_logprobs=2,
        skip_special_tokens=False, allowed_token_ids=(3, 5), bad_words=("b",), best_of=4, use_beam_search=True,
        length_penalty=0.5, early_stopping="never",
    )  # fmt: skip


GUIDANCE: dict[str, tuple[dict[str, Any], str]] = {
    "json_schema": ({"json_schema": '{"type": "object"}'}, guidance.from_json_schema({"type": "object"})),
    "regex": ({"regex": "a+"}, guidance.from_regex("a+")),
    "choice": ({"choice": pb.Choice(texts=["a", "b"])}, guidance.from_choice(["a", "b"])),
    "grammar": ({"grammar": 'start: "a"'}, guidance.from_lark('start: "a"')),
    "json_object": ({"json_object": True}, guidance.from_json_schema(guidance.ANY_JSON_OBJECT)),
}


@pytest.mark.parametrize("kind", GUIDANCE)
def test_each_kind_of_guidance_becomes_a_grammar(kind: str) -> None:
    fields, grammar = GUIDANCE[kind]
    params, param = with_guidance(SamplingParams(), pb.SamplingParams(**fields))
    assert (params.guidance, param) == (grammar, f"sampling_params.{kind}")


def test_unset_sampling_fields_keep_their_defaults() -> None:
    assert sampling_params_from(pb.SamplingParams(), {}, max_tokens=16) == SamplingParams()
    greedy = sampling_params_from(pb.SamplingParams(temperature=0.0), {"temperature": 0.7}, max_tokens=None)
    assert greedy == SamplingParams(temperature=0.0, max_tokens=None)


def test_every_proto_field_is_commented() -> None:
    root = Path(__file__).resolve().parents[3]
    files = list((root / "proto").rglob("*.proto"))
    assert len(files) == 2
    for path in files:
        lines = [line.strip() for line in path.read_text().splitlines()]
        bare = [
            line for before, line in pairwise(lines)
            if (" = " in line and line.endswith(";") or line.startswith(("rpc ", "oneof ")))
            and not line.startswith(("//", "syntax", "option")) and not before.startswith("//")
        ]  # fmt: skip
        assert [line for line in bare if not line.endswith("UNSPECIFIED = 0;")] == [], path


NUMBERS = ("int32", "int64", "uint32", "uint64", "sint32", "sint64", "float", "double")
# Words that tell of a number what it counts, in what unit, or between what it lies.
UNITS = (
    "token", "seconds", "bytes", "blocks", "logarithm", "place", "which", "index", "request", "answers", "numbers",
    "text", " to ", "datatype", "dimensions", "number", "steps", "nanoseconds", "events", "vector", "beams",
)  # fmt: skip


def test_every_number_has_a_unit_or_a_range() -> None:
    root = Path(__file__).resolve().parents[3]
    for path in (root / "proto").rglob("*.proto"):
        comment = ""
        for line in (line.strip() for line in path.read_text().splitlines()):
            if line.startswith("//"):
                comment += line + " "
                continue
            kind = line.removeprefix("optional ").removeprefix("repeated ").split(" ")[0]
            if kind in NUMBERS and line.endswith(";"):
                assert any(unit in comment.lower() for unit in UNITS), f"{path.name}: {line} {comment}"
            comment = ""
