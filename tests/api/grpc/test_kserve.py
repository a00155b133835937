"""inference.GRPCInferenceService as its published clients use it: tensors in, tensors out, streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

import servd
from servd.api.grpc._pb.inference import grpc_service_pb2 as pb
from servd.api.kserve.settings import settings_from
from servd.engine import guidance
from tests.api.grpc.grpc_helpers import MODEL, error_of, run, served
from tests.api.grpc.kserve_helpers import outputs_of, request_of, streamed, stub_of

Code = grpc.StatusCode
REPLIES = {"capital": "Paris – 🗼!"}


def test_what_the_server_is_and_serves(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            stub = stub_of(s)
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
            assert (await stub.ModelReady(pb.ModelReadyRequest(name=MODEL, version="1"))).ready
            assert not (await stub.ModelReady(pb.ModelReadyRequest(name="other"))).ready
            server = await stub.ServerMetadata(pb.ServerMetadataRequest())
            assert (server.name, server.version) == ("servd", servd.__version__)
            model = await stub.ModelMetadata(pb.ModelMetadataRequest(name=MODEL))
            assert (model.name, list(model.versions), model.platform) == (MODEL, ["1"], "servd")
            assert ("text_input", "BYTES", [1]) in [(t.name, t.datatype, list(t.shape)) for t in model.inputs]
            assert ("text_output", "BYTES", [-1]) in [(t.name, t.datatype, list(t.shape)) for t in model.outputs]
            config = (await stub.ModelConfig(pb.ModelConfigRequest(name=MODEL))).config
            assert config.model_transaction_policy.decoupled
            assert [i.name for i in config.input if not i.optional] == ["text_input"]
            (entry,) = (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
            assert (entry.name, entry.version, entry.state) == (MODEL, "1", "READY")
            s.fake.engine.state = "draining"
            assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
            assert not (await stub.ModelReady(pb.ModelReadyRequest(name=MODEL))).ready
            (entry,) = (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
            assert entry.state == "UNAVAILABLE"
            assert not (await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live

    run(test)


@pytest.mark.parametrize("raw", [True, False])
def test_infer_gives_the_prompt_and_its_answer(raw: bool, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"replies": REPLIES}) as s:
            infer = stub_of(s).ModelInfer
            reply = await infer(request_of("The capital?", raw=raw, max_tokens=50))
            assert (reply.model_name, reply.model_version, reply.id) == (MODEL, "1", "r1")
            assert outputs_of(reply) == {"text_output": ["The capital?Paris – 🗼!"]}
            flags = {"exclude_input_in_output": True, "stream": False}
            reply = await infer(request_of("The capital?", raw=raw, flags=flags, max_tokens=50))
            assert outputs_of(reply) == {"text_output": ["Paris – 🗼!"]}

    run(test)


def test_all_outputs_of_several_answers(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            names = ["finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens"]
            flags = {f"return_{name}": True for name in names} | {"exclude_input_in_output": True}
            request = request_of("abc", flags=flags, n=2, seed=3, max_tokens=4, logprobs=1)
            found = outputs_of(await stub_of(s).ModelInfer(request))
            assert list(found) == ["text_output", *names]
            assert [len(text) for text in found["text_output"]] == [4, 4]
            assert found["text_output"][0] != found["text_output"][1]
            assert found["finish_reason"] == ["length", "length"]
            assert found["cumulative_logprob"] == [-2.0, -2.0]
            assert found["num_input_tokens"] == [3]
            assert found["num_output_tokens"] == [4, 4]
            entries = json.loads(found["logprobs"][1])
            first = found["text_output"][1][0]
            assert entries[0][str(ord(first))] == {"logprob": -0.5, "rank": 1, "decoded_token": first}
            request.outputs.add(name="num_output_tokens")
            assert outputs_of(await stub_of(s).ModelInfer(request)) == {"num_output_tokens": [4, 4]}

    run(test)


def test_parameters_may_be_text_or_request_parameters(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            infer = stub_of(s).ModelInfer
            plain = await infer(request_of(max_tokens=7, temperature=0, seed=1, ignore_eos=True, stop=["zz"]))
            as_text = await infer(
                request_of(max_tokens="7", temperature="0.0", seed="1", ignore_eos="true", stop="zz")
            )
            request = request_of()
            request.parameters["max_tokens"].int64_param = 7
            request.parameters["temperature"].double_param = 0.0
            request.parameters["seed"].uint64_param = 1
            request.parameters["stop"].string_param = "zz"
            request.parameters["triton_enable_empty_final_response"].bool_param = True
            as_parameters = await infer(request)
            cut = await infer(
                request_of("Say Hello", truncate_prompt_tokens=5, cache_salt="s", max_tokens=7, temperature=0)
            )
            assert outputs_of(cut)["text_output"] == ["Say " + outputs_of(plain)["text_output"][0]]
            assert outputs_of(plain) == outputs_of(as_text) == outputs_of(as_parameters)
            assert len(outputs_of(plain)["text_output"][0]) == len("Hello") + 7

    run(test)


def test_a_prompt_is_cut_to_what_leaves_room_for_the_answer(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, max_position_embeddings=32) as s:
            asked = request_of(
                "x" * 100, flags={"return_num_input_tokens": True}, truncate_prompt_tokens=-1, max_tokens=12
            )
            assert outputs_of(await stub_of(s).ModelInfer(asked))["num_input_tokens"] == [20]

    run(test)


def test_a_stream_gives_new_text_and_says_when_it_ends(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"replies": REPLIES}) as s:
            replies = await streamed(s, request_of("The capital?", flags={"stream": True}, max_tokens=50))
            assert {reply.infer_response.id for reply in replies} == {"r1"}
            texts = [outputs_of(reply.infer_response)["text_output"][0] for reply in replies]
            assert len(texts) > 1 and "".join(texts) == "Paris – 🗼!"
            finals = [reply.infer_response.parameters["triton_final_response"].bool_param for reply in replies]
            assert finals == [False] * (len(replies) - 1) + [True]
            (whole,) = await streamed(s, request_of("The capital?", max_tokens=50))
            assert outputs_of(whole.infer_response) == {"text_output": ["The capital?Paris – 🗼!"]}

    run(test)


def test_one_stream_carries_many_requests_and_outlives_a_bad_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            requests = []
            for i in range(20):
                request = request_of(f"prompt {i}", flags={"stream": True}, max_tokens=5 + i, temperature=0)
                request.id = str(i)
                requests.append(request)
            bad = request_of("x", max_tokens=-1)
            bad.id = "bad"
            replies = await streamed(s, *requests[:10], bad, *requests[10:])
            texts: dict[str, str] = {}
            for reply in replies:
                response = reply.infer_response
                if reply.error_message:
                    assert response.id == "bad" and "max_tokens is -1" in reply.error_message
                    assert response.parameters["triton_final_response"].bool_param
                else:
                    texts[response.id] = texts.get(response.id, "") + outputs_of(response)["text_output"][0]
            assert {key: len(text) for key, text in texts.items()} == {str(i): 5 + i for i in range(20)}
            alone = await stub_of(s).ModelInfer(request_of("prompt 7", max_tokens=12, temperature=0))
            assert outputs_of(alone)["text_output"] == ["prompt 7" + texts["7"]]

    run(test)


def test_a_cancelled_stream_frees_its_requests(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"step_delay": 0.002}) as s:
            call = stub_of(s).ModelStreamInfer()
            for _ in range(5):
                await call.write(request_of(flags={"stream": True}, max_tokens=1500))
            assert not (await call.read()).error_message
            await s.fake.wait_until(lambda: s.fake.engine.stats().running == 5)
            call.cancel()
            await s.fake.wait_idle()

    run(test)


def test_a_timeout_in_microseconds_ends_a_request(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"step_delay": 0.01}) as s:
            request = request_of(max_tokens=1500)
            request.parameters["timeout"].int64_param = 100_000
            assert (await error_of(stub_of(s).ModelInfer(request))).code() == Code.DEADLINE_EXCEEDED
            (reply,) = await streamed(s, request)
            assert "deadline of 0.1 s" in reply.error_message
            await s.fake.wait_idle()

    run(test)


def test_statistics_count_what_was_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            stub = stub_of(s)
            for _ in range(3):
                await stub.ModelInfer(request_of(max_tokens=2))
            (stats,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest())).model_stats
            assert (stats.name, stats.version, stats.inference_count) == (MODEL, "1", 3)
            assert stats.inference_stats.success.count == stats.inference_stats.queue.count == 3
            assert stats.inference_stats.success.ns > 0

    run(test)


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "guided_json text": ({"guided_json": '{"type": "object"}'}, guidance.from_json_schema({"type": "object"})),
    "guided_json": ({"guided_json": {"type": "object"}}, guidance.from_json_schema({"type": "object"})),
    "guided_regex": ({"guided_regex": "a+"}, guidance.from_regex("a+")),
    "guided_choice": ({"guided_choice": ["a", "b"]}, guidance.from_choice(["a", "b"])),
    "guided_grammar": ({"guided_grammar": 'start: "a"'}, guidance.from_lark('start: "a"')),
    "guided_decoding": ({"guided_decoding": {"choice": ["a"]}}, guidance.from_choice(["a"])),
    "structured_outputs": (
        {"structured_outputs": {"json_object": True}}, guidance.from_json_schema(guidance.ANY_JSON_OBJECT)
    ),
    "nothing": ({"structured_outputs": {"json_object": False}}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_each_way_to_ask_for_a_form_becomes_a_grammar(case: str) -> None:
    values, grammar = ASKED[case]
    settings = settings_from(values)
    assert (settings.sampling_params(257, {}).guidance or "") == grammar
    if grammar:
        assert settings.guidance_param.split(".")[0] in values
