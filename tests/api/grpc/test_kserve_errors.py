"""Tensors, parameters and outputs that inference.GRPCInferenceService refuses: by name, and disturbing nobody.

Fault 45: shapes and bytes that do not match, unknown datatypes, duplicate names.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from servd.api.grpc._pb.inference import grpc_service_pb2 as pb
from tests.api.grpc.grpc_helpers import MODEL, blamed_field, error_of, run, served
from tests.api.grpc.kserve_helpers import Request, outputs_of, packed, request_of, streamed, stub_of

Code = grpc.StatusCode


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
    "a grammar that cannot be followed": (request_of(guided_regex="("), Code.INVALID_ARGUMENT, "guided_regex"),
    "a schema that is no JSON": (request_of(guided_json="{"), Code.INVALID_ARGUMENT, "guided_json"),
    "an inner grammar": (
        request_of(structured_outputs={"regex": "("}), Code.INVALID_ARGUMENT, "structured_outputs.regex"
    ),
    "two inner grammars": (
        request_of(guided_decoding={"regex": "a", "json_object": True}), Code.INVALID_ARGUMENT, "guided_decoding.regex"
    ),
    "no grammar's name": (
        request_of(structured_outputs={"yaml": "a"}), Code.INVALID_ARGUMENT, "structured_outputs.yaml"
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
    "sampling_parameters that are no text": (
        set_parameter("sampling_parameters", "int64_param", 3), Code.INVALID_ARGUMENT, "sampling_parameters"
    ),
    "long salt": (request_of(cache_salt="x" * 300), Code.INVALID_ARGUMENT, "cache_salt"),
    "keep no token": (request_of(truncate_prompt_tokens=0), Code.INVALID_ARGUMENT, "truncate_prompt_tokens"),
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
