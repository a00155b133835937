"""Both fronts over one engine, and each dialect as one function from settings to what it tells of the answer.

A request is a prompt and settings by vLLM's names. What a dialect cannot show (token ids, log-probabilities) it leaves
None, and it raises UnsayableError for settings that it has no words for. Chat's template makes PROMPT of MESSAGE.
"""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from servd.api.grpc._pb.inference import grpc_service_pb2 as kserve
from servd.api.grpc._pb.inference import grpc_service_pb2_grpc as kserve_grpc
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.grpc._pb.servd.v1 import inference_pb2_grpc as pb_grpc
from servd.api.grpc.server import start_grpc
from servd.api.http.app import start_http, stop_http
from servd.api.service import InferenceService
from servd.config import ServerConfig
from tests.fakes import FakeEngine

MESSAGE = "Tell me."
PROMPT = f"user: {MESSAGE}\nassistant: "


@dataclass
class Fronts:
    """Both fronts of one service."""

    fake: FakeEngine
    session: aiohttp.ClientSession
    url: str
    inference: Any
    kserve: Any


@dataclass
class Told:
    """An answer (or several) as a dialect tells of it."""

    texts: list[str]
    finish_reasons: list[str]
    token_ids: list[list[int]] | None = None
    logprobs: list[list[tuple[str, float]]] | None = None  # (token's text, its log-probability)
    num_prompt_tokens: int | None = None


@dataclass
class RefusedError(Exception):
    """A refusal as a dialect tells of it."""

    field: str  # without what the dialect's message puts before the name
    message: str
    status: str = field(compare=False)


class UnsayableError(Exception):
    """The dialect has no field for one of the settings."""


@asynccontextmanager
async def fronts(folder: Path, **executor_options: Any) -> AsyncIterator[Fronts]:
    """Both fronts on free ports, over one fake engine; in the end nothing may still run."""
    async with FakeEngine(folder, executor_options=executor_options) as fake:
        service = InferenceService(fake.engine, "fake")
        config = ServerConfig(port=0, grpc_port=0)
        runner, port = await start_http(service, config)
        server, grpc_port = await start_grpc(service, config)
        try:
            async with (
                aiohttp.ClientSession() as session,
                grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
            ):
                inference = pb_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
                inference_v2 = kserve_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
                yield Fronts(fake, session, f"http://127.0.0.1:{port}", inference, inference_v2)
                await fake.wait_idle()
        finally:
            await server.stop(0)
            await stop_http(runner)


# -- over HTTP -------------------------------------------------------------------------------------------------------


async def post(f: Fronts, path: str, body: dict[str, Any]) -> Any:
    """The reply's JSON, or the data of its events. Raises RefusedError."""
    async with f.session.post(f.url + path, json=body) as response:
        data = await response.read()
        if response.status != 200:
            error = json.loads(data)["error"]
            assert response.status < 500, error
            message = error if isinstance(error, str) else error["message"]
            # Neither the inference protocol nor Anthropic has a place for the field: it is the message's first word.
            blamed = error["param"] if isinstance(error, dict) and "param" in error else message.split(" ")[0]
            raise RefusedError(blamed, message, str(response.status))
        if not response.content_type.startswith("text/event-stream"):
            return json.loads(data)
    lines = [line for line in data.decode().split("\n") if line.startswith("data: ") and line != "data: [DONE]"]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def openai_body(settings: dict[str, Any]) -> dict[str, Any]:
    body = {"model": "fake", "return_token_ids": True} | settings
    if "logit_bias" in body:
        body["logit_bias"] = {str(key): value for key, value in body["logit_bias"].items()}
    return body


async def completions(f: Fronts, settings: dict[str, Any]) -> Told:
    reply = await post(f, "/v1/completions", openai_body(settings) | {"prompt": PROMPT})
    choices = reply["choices"]
    logprobs = [
        list(zip(c["logprobs"]["tokens"], c["logprobs"]["token_logprobs"], strict=True))
        for c in choices if c["logprobs"]
    ]  # fmt: skip
    return Told(
        [c["text"] for c in choices], [c["finish_reason"] for c in choices], [c["token_ids"] for c in choices],
        logprobs or None, reply["usage"]["prompt_tokens"],
    )  # fmt: skip


async def completions_streamed(f: Fronts, settings: dict[str, Any]) -> Told:
    body = openai_body(settings) | {"prompt": PROMPT, "stream": True}
    return joined_choices(await post(f, "/v1/completions", body), lambda choice: choice["text"])


async def chat(f: Fronts, settings: dict[str, Any]) -> Told:
    reply = await post(f, "/v1/chat/completions", chat_body(settings))
    choices = reply["choices"]
    logprobs = [
        [(entry["token"], entry["logprob"]) for entry in c["logprobs"]["content"]] for c in choices if c["logprobs"]
    ]
    return Told(
        [c["message"]["content"] for c in choices], [c["finish_reason"] for c in choices],
        [c["token_ids"] for c in choices], logprobs or None, reply["usage"]["prompt_tokens"],
    )  # fmt: skip


async def chat_streamed(f: Fronts, settings: dict[str, Any]) -> Told:
    events = await post(f, "/v1/chat/completions", chat_body(settings) | {"stream": True})
    return joined_choices(events, lambda choice: choice["delta"].get("content") or "")


def chat_body(settings: dict[str, Any]) -> dict[str, Any]:
    body = openai_body({"max_tokens": 16} | settings)
    if "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    return body | {"messages": [{"role": "user", "content": MESSAGE}]}


def joined_choices(events: list[Any], text_of: Callable[[Any], str]) -> Told:
    n = 1 + max(choice["index"] for event in events for choice in event["choices"])
    told = Told([""] * n, [""] * n, [[] for _ in range(n)])
    assert told.token_ids is not None
    for choice in (choice for event in events for choice in event["choices"]):
        index = choice["index"]
        told.texts[index] += text_of(choice)
        told.token_ids[index] += choice.get("token_ids") or []
        told.finish_reasons[index] = choice["finish_reason"] or ""
    return told


_SHARED = ("temperature", "top_p", "top_k", "seed", "ignore_eos")
RESPONSES_NAMES = {name: name for name in (*_SHARED, "stop", "min_p", "presence_penalty", "frequency_penalty",
                                           "repetition_penalty")} | {"max_tokens": "max_output_tokens"}  # fmt: skip
MESSAGES_NAMES = {name: name for name in (*_SHARED, "max_tokens")} | {"stop": "stop_sequences"}


async def post_renamed(f: Fronts, path: str, body: dict[str, Any], settings: Any, names: dict[str, str]) -> Any:
    """Post settings by the dialect's own names; a refusal is told by vLLM's again."""
    if settings.keys() - names.keys():
        raise UnsayableError
    own = {names[name]: value for name, value in settings.items()}
    try:
        return await post(f, path, body | own)
    except RefusedError as refusal:
        for name, own_name in names.items():
            if refusal.field.split(".")[0] == own_name:
                refusal.field, refusal.message = name, refusal.message.replace(own_name, name)
                break
        raise


async def responses(f: Fronts, settings: dict[str, Any]) -> Told:
    reply = await post_renamed(
        f, "/v1/responses", {"input": MESSAGE}, {"max_tokens": 16} | settings, RESPONSES_NAMES
    )
    (message,) = reply["output"]
    reason = "stop" if reply["status"] == "completed" else "length"
    return Told([message["content"][0]["text"]], [reason], num_prompt_tokens=reply["usage"]["input_tokens"])


async def messages(f: Fronts, settings: dict[str, Any]) -> Told:
    body = {"messages": [{"role": "user", "content": MESSAGE}], "model": "fake"}
    reply = await post_renamed(f, "/v1/messages", body, {"max_tokens": 16} | settings, MESSAGES_NAMES)
    reason = "length" if reply["stop_reason"] == "max_tokens" else "stop"
    usage = reply["usage"]
    num_prompt_tokens = usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0)
    return Told([part["text"] for part in reply["content"]], [reason], num_prompt_tokens=num_prompt_tokens)


async def v2_infer(f: Fronts, settings: dict[str, Any]) -> Told:
    packed = json.dumps(settings)
    inputs = [
        {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [PROMPT]},
        {"name": "sampling_parameters", "shape": [1], "datatype": "BYTES", "data": [packed]},
        *({"name": name, "shape": [1], "datatype": "BOOL", "data": [True]} for name in V2_FLAGS),
    ]
    reply = await post(f, "/v2/models/fake/infer", {"inputs": inputs})
    return told_by_tensors({output["name"]: output["data"] for output in reply["outputs"]})


async def v2_generate(f: Fronts, settings: dict[str, Any]) -> Told:
    body = {"text_input": PROMPT, "parameters": settings | dict.fromkeys(V2_FLAGS, True)}
    return told_by_tensors(as_lists(await post(f, "/v2/models/fake/generate", body)))


async def v2_generate_stream(f: Fronts, settings: dict[str, Any]) -> Told:
    body = {"text_input": PROMPT, "stream": True, "parameters": settings | dict.fromkeys(V2_FLAGS, True)}
    return joined_tensors([as_lists(event) for event in await post(f, "/v2/models/fake/generate_stream", body)])


def as_lists(reply: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: value if isinstance(value, list) else [value] for name, value in reply.items()}


# -- over gRPC -------------------------------------------------------------------------------------------------------


async def generate(f: Fronts, settings: dict[str, Any]) -> Told:
    params = pb.SamplingParams(**settings)
    return await told_by_chunks(f.inference.Generate(pb.GenerateRequest(text=PROMPT, sampling_params=params)))


async def grpc_chat(f: Fronts, settings: dict[str, Any]) -> Told:
    params = pb.SamplingParams(**{"max_tokens": 16} | settings)
    message = pb.ChatMessage(role="user", content=MESSAGE)
    return await told_by_chunks(f.inference.Chat(pb.ChatRequest(messages=[message], sampling_params=params)))


async def told_by_chunks(call: Any) -> Told:
    try:
        chunks = [chunk async for chunk in call]
    except grpc.aio.AioRpcError as error:
        raise refused(error, "sampling_params.") from None
    n = 1 + max(chunk.index for chunk in chunks)
    told = Told([""] * n, [""] * n, [[] for _ in range(n)], [[] for _ in range(n)])
    assert told.token_ids is not None and told.logprobs is not None
    for chunk in chunks:
        told.texts[chunk.index] += chunk.text
        told.token_ids[chunk.index] += chunk.token_ids
        told.logprobs[chunk.index] += [(entry.token, entry.logprob) for entry in chunk.logprobs]
        if chunk.finish_reason:
            reason = pb.FinishReason.Name(chunk.finish_reason)
            told.finish_reasons[chunk.index] = reason.removeprefix("FINISH_REASON_").lower()
            told.num_prompt_tokens = chunk.usage.prompt_tokens
    if not any(told.logprobs):
        told.logprobs = None
    return told


def refused(error: grpc.aio.AioRpcError, prefix: str) -> RefusedError:
    trailer = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailer["grpc-status-details-bin"])
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details), error
    (violation,) = bad_request.field_violations
    return RefusedError(violation.field.removeprefix(prefix), str(error.details()), error.code().name)


V2_FLAGS = ("exclude_input_in_output", "return_finish_reason", "return_num_input_tokens")


def kserve_request(settings: dict[str, Any], *flags: str) -> kserve.ModelInferRequest:
    request = kserve.ModelInferRequest(model_name="fake")
    values = {"text_input": PROMPT, "sampling_parameters": json.dumps(settings)} | dict.fromkeys(flags, True)
    for name, value in values.items():
        datatype = "BOOL" if value is True else "BYTES"
        request.inputs.add(name=name, datatype=datatype, shape=[1])
        data = b"\1" if isinstance(value, bool) else struct.pack("<I", len(value.encode())) + value.encode()
        request.raw_input_contents.append(data)
    return request


async def kserve_infer(f: Fronts, settings: dict[str, Any]) -> Told:
    try:
        return told_by_tensors(tensors_of(await f.kserve.ModelInfer(kserve_request(settings, *V2_FLAGS))))
    except grpc.aio.AioRpcError as error:
        raise refused(error, "parameters.") from None


async def kserve_stream(f: Fronts, settings: dict[str, Any]) -> Told:
    call = f.kserve.ModelStreamInfer(iter([kserve_request(settings, "stream", *V2_FLAGS)]))
    replies = [reply async for reply in call]
    if message := replies[0].error_message:
        raise RefusedError(message.split(" ")[0], message, "error_message")
    return joined_tensors([tensors_of(reply.infer_response) for reply in replies])


def tensors_of(response: kserve.ModelInferResponse) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for tensor, data in zip(response.outputs, response.raw_output_contents, strict=True):
        values: list[Any] = []
        while data:
            if tensor.datatype == "BYTES":
                end = 4 + struct.unpack_from("<I", data)[0]
                values.append(data[4:end].decode())
            else:
                end = 4
                values.append(struct.unpack_from("<I", data)[0])
            data = data[end:]
        found[tensor.name] = values
    return found


def told_by_tensors(tensors: dict[str, list[Any]]) -> Told:
    (num_prompt_tokens,) = tensors["num_input_tokens"]
    return Told(tensors["text_output"], tensors["finish_reason"], num_prompt_tokens=num_prompt_tokens)


def joined_tensors(replies: list[dict[str, list[Any]]]) -> Told:
    told = told_by_tensors(replies[0])
    for reply in replies[1:]:
        told.texts = [a + b for a, b in zip(told.texts, reply["text_output"], strict=True)]
        told.finish_reasons = [
            a if b == "None" else b for a, b in zip(told.finish_reasons, reply["finish_reason"], strict=True)
        ]
    return told


# -- the table ---------------------------------------------------------------------------------------------------------

DIALECTS: dict[str, Callable[[Fronts, dict[str, Any]], Awaitable[Told]]] = {
    "/v1/completions": completions,
    "/v1/completions streamed": completions_streamed,
    "/v1/chat/completions": chat,
    "/v1/chat/completions streamed": chat_streamed,
    "/v1/responses": responses,
    "/v1/messages": messages,
    "gRPC Generate": generate,
    "gRPC Chat": grpc_chat,
    "gRPC ModelInfer": kserve_infer,
    "gRPC ModelStreamInfer": kserve_stream,
    "/v2 infer": v2_infer,
    "/v2 generate": v2_generate,
    "/v2 generate_stream": v2_generate_stream,
}
