"""inference.GRPCInferenceService as its published clients use it: tensors in, tensors out, streams, refusals."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import servd
from servd.api.grpc._pb.inference import grpc_service_pb2 as pb
from servd.api.grpc._pb.inference import grpc_service_pb2_grpc as pb_grpc
from tests.api.grpc.grpc_helpers import MODEL, Served, blamed_field, error_of, run, served

Code = grpc.StatusCode
REPLIES = {"capital": "Paris – 🗼!"}
Request = pb.ModelInferRequest


def stub_of(s: Served) -> Any:
    return pb_grpc.GRPCInferenceServiceStub(s.channel)  # type: ignore[no-untyped-call]


def packed(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<I", len(data)) + data


def request_of(text: str = "Hello", *, flags: dict[str, bool] | None = None, raw: bool = True, **sampling: Any) -> Any:
    """A request as tritonclient makes it; `raw`: values as bytes. Sampling settings go in the JSON tensor."""
    values: dict[str, Any] = {"text_input": text.encode(), **(flags or {})}
    if sampling:
        values["sampling_parameters"] = json.dumps(sampling).encode()
    request = Request(model_name=MODEL, id="r1")
    for name, value in values.items():
        tensor = request.inputs.add(name=name, datatype="BOOL" if isinstance(value, bool) else "BYTES", shape=[1])
        if raw:
            request.raw_input_contents.append(
                struct.pack("?", value) if isinstance(value, bool) else packed(value)
            )
        elif isinstance(value, bool):
            tensor.contents.bool_contents.append(value)
        else:
            tensor.contents.bytes_contents.append(value)
    return request


def outputs_of(response: pb.ModelInferResponse) -> dict[str, list[Any]]:
    """The values of each output, read back from the bytes."""
    found: dict[str, list[Any]] = {}
    for tensor, data in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.datatype == "BYTES":
            values = []
            while data:
                (length,) = struct.unpack_from("<I", data)
                values.append(data[4 : 4 + length].decode())
                data = data[4 + length :]
        else:
            values = list(struct.unpack(f"<{len(data) // 4}{'I' if tensor.datatype == 'UINT32' else 'f'}", data))
        assert list(tensor.shape) == [len(values)]
        found[tensor.name] = values
    return found


async def streamed(s: Served, *requests: Any) -> list[pb.ModelStreamInferResponse]:
    call = stub_of(s).ModelStreamInfer(iter(requests))
    return [response async for response in call]


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
            assert outputs_of(plain) == outputs_of(as_text) == outputs_of(as_parameters)
            assert len(outputs_of(plain)["text_output"][0]) == len("Hello") + 7

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


def changed(change: Any, **options: Any) -> Any:
    request = request_of(**options)
    change(request)
    return request


def set_parameter(name: str, kind: str, value: Any) -> Any:
    return changed(lambda r: setattr(r.parameters[name], kind, value))


WRONG: dict[str, tuple[Any, Code, str]] = {
    "no input": (Request(model_name=MODEL), Code.INVALID_ARGUMENT, "inputs"),
    "unknown input": (
        changed(lambda r: setattr(r.inputs[0], "name", "prompt")), Code.INVALID_ARGUMENT, "inputs[0].name"
    ),
    "unknown datatype": (
        changed(lambda r: setattr(r.inputs[0], "datatype", "UTF8")), Code.INVALID_ARGUMENT, "inputs[0].datatype"
    ),
    "wrong datatype": (
        changed(lambda r: setattr(r.inputs[0], "datatype", "BOOL")), Code.INVALID_ARGUMENT, "inputs[0].datatype"
    ),
    "wrong shape": (changed(lambda r: r.inputs[0].shape.append(2)), Code.INVALID_ARGUMENT, "inputs[0].shape"),
    "huge shape": (
        changed(lambda r: r.inputs[0].shape.extend([1 << 62] * 9)), Code.INVALID_ARGUMENT, "inputs[0].shape"
    ),
    "negative shape": (
        changed(lambda r: r.inputs[0].shape.__setitem__(0, -1)), Code.INVALID_ARGUMENT, "inputs[0].shape"
    ),
    "duplicate input": (
        changed(lambda r: (r.inputs.append(r.inputs[0]), r.raw_input_contents.append(packed("x")))),
        Code.INVALID_ARGUMENT, "inputs[1].name",
    ),
    "input and parameter": (set_parameter("text_input", "string_param", "x"), Code.INVALID_ARGUMENT, "inputs[0].name"),
    "too few raw contents": (
        changed(lambda r: r.inputs.add(name="stream", datatype="BOOL", shape=[1])),
        Code.INVALID_ARGUMENT, "raw_input_contents",
    ),
    "raw and typed contents": (
        changed(lambda r: r.inputs[0].contents.bytes_contents.append(b"x")), Code.INVALID_ARGUMENT, "inputs[0].contents"
    ),
    "typed contents of another kind": (
        changed(lambda r: r.inputs[0].contents.fp32_contents.append(1.0), raw=False),
        Code.INVALID_ARGUMENT, "inputs[0].contents",
    ),
    "too many typed contents": (
        changed(lambda r: r.inputs[0].contents.bytes_contents.append(b"x"), raw=False),
        Code.INVALID_ARGUMENT, "inputs[0].contents",
    ),
    "raw without length": (
        changed(lambda r: r.raw_input_contents.__setitem__(0, b"Hi")), Code.INVALID_ARGUMENT, "raw_input_contents[0]"
    ),
    "raw cut off": (
        changed(lambda r: r.raw_input_contents.__setitem__(0, packed("Hello")[:-1])),
        Code.INVALID_ARGUMENT, "raw_input_contents[0]",
    ),
    "raw with a rest": (
        changed(lambda r: r.raw_input_contents.__setitem__(0, packed("Hello") + packed(""))),
        Code.INVALID_ARGUMENT, "raw_input_contents[0]",
    ),
    "raw length of 4 GiB": (
        changed(lambda r: r.raw_input_contents.__setitem__(0, b"\xff\xff\xff\xff")),
        Code.INVALID_ARGUMENT, "raw_input_contents[0]",
    ),
    "raw BOOL of two bytes": (
        changed(lambda r: r.raw_input_contents.__setitem__(1, b"\1\1"), flags={"stream": False}),
        Code.INVALID_ARGUMENT, "raw_input_contents[1]",
    ),
    "not UTF-8": (
        changed(lambda r: r.raw_input_contents.__setitem__(0, packed(b"\xff"))), Code.INVALID_ARGUMENT, "text_input"
    ),
    "empty text": (request_of(""), Code.INVALID_ARGUMENT, "text_input"),
    "text too long": (request_of("x" * 300), Code.INVALID_ARGUMENT, "text_input"),
    "input's parameter": (
        changed(lambda r: setattr(r.inputs[0].parameters["shared_memory_region"], "string_param", "x")),
        Code.INVALID_ARGUMENT, "inputs[0].parameters",
    ),
    "unknown output": (changed(lambda r: r.outputs.add(name="logits")), Code.INVALID_ARGUMENT, "outputs[0].name"),
    "duplicate output": (
        changed(lambda r: (r.outputs.add(name="text_output"), r.outputs.add(name="text_output"))),
        Code.INVALID_ARGUMENT, "outputs[1].name",
    ),
    "classification": (
        changed(lambda r: setattr(r.outputs.add(name="text_output").parameters["classification"], "int64_param", 3)),
        Code.INVALID_ARGUMENT, "outputs[0].parameters",
    ),
    "unknown parameter": (set_parameter("temprature", "double_param", 1.0), Code.INVALID_ARGUMENT, "temprature"),
    "parameter of no kind": (changed(lambda r: r.parameters["seed"].Clear()), Code.INVALID_ARGUMENT, "parameters.seed"),
    "parameter of the wrong kind": (
        set_parameter("max_tokens", "string_param", "many"), Code.INVALID_ARGUMENT, "parameters.max_tokens"
    ),
    "parameter out of range": (request_of(top_p=1.5), Code.INVALID_ARGUMENT, "parameters.top_p"),
    "not a number": (request_of(temperature="nan"), Code.INVALID_ARGUMENT, "parameters.temperature"),
    "parameter given twice": (
        changed(lambda r: setattr(r.parameters["seed"], "int64_param", 1), seed=1), Code.INVALID_ARGUMENT,
        "parameters.seed",
    ),
    "a sequence": (set_parameter("sequence_id", "int64_param", 1), Code.UNIMPLEMENTED, "sequence_id"),
    "a priority": (set_parameter("priority", "uint64_param", 1), Code.UNIMPLEMENTED, "priority"),
    "timeout 0": (set_parameter("timeout", "int64_param", 0), Code.INVALID_ARGUMENT, "timeout"),
    "prompt_logprobs": (request_of(prompt_logprobs=1), Code.UNIMPLEMENTED, "parameters.prompt_logprobs"),
    "logprobs not computed": (
        request_of(flags={"return_logprobs": True}), Code.INVALID_ARGUMENT, "parameters.logprobs"
    ),
    "two grammars": (request_of(guided_regex="a", guided_grammar="b"), Code.INVALID_ARGUMENT, "guided_regex"),
    "a stream in one reply": (request_of(flags={"stream": True}), Code.INVALID_ARGUMENT, "stream"),
    "a stream with its input": (
        request_of(flags={"stream": True, "exclude_input_in_output": False}),
        Code.INVALID_ARGUMENT, "exclude_input_in_output",
    ),
    "sampling_parameters not JSON": (
        changed(lambda r: (r.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1]),
                           r.raw_input_contents.append(packed("{")))),
        Code.INVALID_ARGUMENT, "sampling_parameters",
    ),
    "sampling_parameters nested": (
        changed(lambda r: (r.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1]),
                           r.raw_input_contents.append(packed('{"stop":' + "[" * 100_000)))),
        Code.INVALID_ARGUMENT, "sampling_parameters",
    ),
    "long id": (changed(lambda r: setattr(r, "id", "x" * 300)), Code.INVALID_ARGUMENT, "id"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_and_disturbs_nobody(case: str, tmp_path: Path) -> None:
    request, code, field = WRONG[case]

    async def test() -> None:
        async with served(tmp_path, max_position_embeddings=256) as s:
            alone = outputs_of(await stub_of(s).ModelInfer(request_of("canary", temperature=0, max_tokens=30)))
            canary = asyncio.ensure_future(stub_of(s).ModelInfer(request_of("canary", temperature=0, max_tokens=30)))
            error = await error_of(stub_of(s).ModelInfer(request))
            assert (error.code(), blamed_field(error)) == (code, field)
            if case != "a stream in one reply":
                (reply,) = await streamed(s, request)
                assert reply.error_message == error.details()
            assert outputs_of(await canary) == alone
            await s.fake.wait_idle()

    run(test)


@pytest.mark.parametrize("name, version", [("other", ""), (MODEL, "2")])
def test_another_model_or_version_is_not_found(name: str, version: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            request = request_of()
            request.model_name, request.model_version = name, version
            assert (await error_of(stub_of(s).ModelInfer(request))).code() == Code.NOT_FOUND
            metadata = pb.ModelMetadataRequest(name=name, version=version)
            assert (await error_of(stub_of(s).ModelMetadata(metadata))).code() == Code.NOT_FOUND

    run(test)
