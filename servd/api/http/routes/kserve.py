"""/v2: the Open Inference Protocol over HTTP, with Triton's binary tensors and its generate extension.

Knows nothing of what a request means: servd.api.kserve does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from servd.api.http.context import SERVICE
from servd.api.http.decode import decode_body, read_body
from servd.api.http.errors import as_servd_error
from servd.api.http.event_stream import send_events
from servd.api.http.kserve import MODEL_PATHS, kserve_error_json, model_of
from servd.api.http.openapi import GENERATES, Endpoint, Operation
from servd.api.http.replies import json_reply
from servd.api.http.reply_types import KServeErrorReply
from servd.api.kserve import model
from servd.api.kserve.answers import InferReply, replies_to, whole_reply
from servd.api.kserve.call import InferRequest, call_from, check_count, input_spec, raw_tensor
from servd.api.kserve.tensors import Tensor, TensorSpec, encode
from servd.api.service import InferenceService
from servd.errors import InvalidRequestError, UnsupportedError

HEADER_LENGTH = "Inference-Header-Content-Length"  # bytes of JSON before the binary tensors
MAX_LENGTH_DIGITS = 18

Parameters = dict[str, Any]


class InputTensor(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tensor in a body; its values are in `data`, or (binary_data_size) behind the JSON."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: Any = None


class OutputTensor(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tensor asked for."""

    name: str
    parameters: Parameters | None = None


class InferBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of /infer."""

    inputs: list[InputTensor]
    id: str = ""
    parameters: Parameters | None = None
    outputs: list[OutputTensor] | None = None


_INFER = msgspec.json.Decoder(InferBody)
_GENERATE = msgspec.json.Decoder(dict[str, Any])


# -- infer -----------------------------------------------------------------------------------------------------------


async def infer(request: web.Request) -> web.Response:
    """Tensors in, tensors out, whole."""
    service = request.app[SERVICE]
    data = await read_body(request)
    header, binary = _split(data, request.headers.get(HEADER_LENGTH))
    body = decode_body(header, _INFER)
    parameters = dict(body.parameters or {})
    all_binary = _flag(parameters.pop("binary_data_output", False), "binary_data_output")
    outputs = body.outputs or []
    check_count(len(outputs), "outputs")
    binary_outputs = {
        output.name for i, output in enumerate(outputs) if _is_binary(output, f"outputs[{i}]", all_binary)
    }
    name, version = model_of(request)
    inputs = _tensors(body.inputs, binary)
    asked = InferRequest(name, version, body.id, parameters, inputs, [output.name for output in outputs])
    call = call_from(asked, service)
    _refuse_stream(call.streams)
    reply = await whole_reply(service, call, None)
    if all_binary and not outputs:
        binary_outputs = {tensor.name for tensor in reply.outputs}
    return _infer_response(service, body.id, reply, binary_outputs)


def _split(data: bytes, length: str | None) -> tuple[bytes, memoryview]:
    """The JSON and the binary tensors behind it. Raises InvalidRequestError."""
    if length is None:
        return data, memoryview(b"")
    if not (length.isascii() and length.isdigit() and len(length) <= MAX_LENGTH_DIGITS and int(length) <= len(data)):
        raise InvalidRequestError(
            f"header {HEADER_LENGTH} is {length[:100]!r}; allowed: 0 to {len(data)}, the length of the body"
        )
    return data[: int(length)], memoryview(data)[int(length) :]


def _tensors(inputs: list[InputTensor], binary: memoryview) -> list[Tensor]:
    check_count(len(inputs), "inputs")
    tensors = []
    start = 0
    for i, tensor in enumerate(inputs):
        where = f"inputs[{i}]"
        spec = input_spec(tensor.name, tensor.datatype, tensor.shape, where)
        parameters = dict(tensor.parameters or {})
        size = parameters.pop("binary_data_size", None)
        _refuse_parameters(parameters, where)
        if size is None:
            tensors.append(_json_tensor(spec, tensor.data, where))
            continue
        if tensor.data is not None:
            raise InvalidRequestError(
                f"{where}.data is set beside binary_data_size; allowed: one of the two", param=f"{where}.data"
            )
        if type(size) is not int or not 0 <= size <= len(binary) - start:
            raise InvalidRequestError(
                f"{where}.parameters.binary_data_size is {repr(size)[:100]}; allowed: 0 to {len(binary) - start}, "
                "what is left behind the JSON",
                param=f"{where}.parameters.binary_data_size",
            )
        tensors.append(raw_tensor(spec, bytes(binary[start : start + size]), f"{where}.data"))
        start += size
    if start != len(binary):
        raise InvalidRequestError(
            f"{len(binary) - start} bytes behind the JSON belong to no input; see {HEADER_LENGTH}", param="inputs"
        )
    return tensors


def _json_tensor(spec: TensorSpec, data: Any, where: str) -> Tensor:
    value_type: type = str if spec.datatype == "BYTES" else bool
    if not (isinstance(data, list) and len(data) == 1 and type(data[0]) is value_type):
        kind = "string" if value_type is str else "true or false"
        raise InvalidRequestError(
            f"{where}.data ({spec.name}) is not what shape {list(spec.shape)} of {spec.datatype} needs; allowed: "
            f"a list of 1 {kind}",
            param=f"{where}.data",
        )
    return Tensor(spec.name, spec.datatype, spec.shape, data)


def _is_binary(output: OutputTensor, where: str, default: bool) -> bool:
    parameters = dict(output.parameters or {})
    wanted = _flag(parameters.pop("binary_data", default), f"{where}.parameters.binary_data")
    _refuse_parameters(parameters, where)
    return wanted


def _flag(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{param} is {repr(value)[:100]}; allowed: true or false", param=param)
    return value


def _refuse_parameters(parameters: Mapping[str, Any], where: str) -> None:
    for name in parameters:
        raise UnsupportedError(f"{where}.parameters.{name[:100]} is not honoured", param=f"{where}.parameters")


def _refuse_stream(streams: bool) -> None:
    if streams:
        raise InvalidRequestError("stream is true; allowed with generate_stream; here is one reply", param="stream")


def _infer_response(
    service: InferenceService, request_id: str, reply: InferReply, binary_outputs: set[str]
) -> web.Response:
    outputs = []
    pieces = []
    for tensor in reply.outputs:
        shown: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if tensor.name in binary_outputs:
            pieces.append(encode(tensor))
            shown["parameters"] = {"binary_data_size": len(pieces[-1])}
        else:
            shown["data"] = _json_values(tensor)
        outputs.append(shown)
    body: dict[str, Any] = {"model_name": service.model_name, "model_version": model.VERSION}
    header = msgspec.json.encode(body | ({"id": request_id} if request_id else {}) | {"outputs": outputs})
    if not pieces:
        return web.Response(body=header, content_type="application/json")
    return web.Response(
        body=header + b"".join(pieces),
        content_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(header))},
    )


def _json_values(tensor: Tensor) -> list[Any]:
    return [value.decode() if isinstance(value, bytes) else value for value in tensor.values]


# -- Triton's generate extension -------------------------------------------------------------------------------------


async def generate(request: web.Request) -> web.Response:
    """Text in, text out: inputs by name, `parameters` beside or around them."""
    service = request.app[SERVICE]
    asked = await _generate_request(request)
    call = call_from(asked, service)
    _refuse_stream(call.streams)
    return json_reply(_generated(service, asked.id, await whole_reply(service, call, None)))


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """The same as server-sent events, one a reply; an error in mid-stream is one too."""
    service = request.app[SERVICE]
    asked = await _generate_request(request)
    call = call_from(asked, service)
    async with aclosing(replies_to(service, call, None)) as replies:
        first = await anext(replies)  # what is refused at once has a status of its own
        return await send_events(request, service.new_request_id("gen"), _events(service, asked.id, first, replies))


async def _events(
    service: InferenceService, request_id: str, first: InferReply, replies: AsyncGenerator[InferReply, None]
) -> AsyncGenerator[list[bytes], None]:
    yield [_event(msgspec.json.encode(_generated(service, request_id, first)))]
    try:
        async for reply in replies:
            yield [_event(msgspec.json.encode(_generated(service, request_id, reply)))]
    except Exception as error:
        yield [_event(kserve_error_json(as_servd_error(error)))]


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def _generate_request(request: web.Request) -> InferRequest:
    body = decode_body(await read_body(request), _GENERATE)
    request_id = body.pop("id", "")
    if not isinstance(request_id, str):
        raise InvalidRequestError(f"id is {repr(request_id)[:100]}; allowed: a string", param="id")
    inner = body.pop("parameters", {})
    if not isinstance(inner, dict):
        raise InvalidRequestError(f"parameters is {repr(inner)[:100]}; allowed: an object", param="parameters")
    for name in inner.keys() & body.keys():
        raise InvalidRequestError(f"{name[:100]} is given twice, once in parameters", param=name[:100])
    name, version = model_of(request)
    return InferRequest(name, version, request_id, body | inner, (), ())


def _generated(service: InferenceService, request_id: str, reply: InferReply) -> dict[str, Any]:
    """A list for several answers, else the value."""
    shown: dict[str, Any] = {"model_name": service.model_name, "model_version": model.VERSION}
    if request_id:
        shown["id"] = request_id
    for tensor in reply.outputs:
        values = _json_values(tensor)
        shown[tensor.name] = values[0] if len(values) == 1 else values
    return shown


_INFER_OPERATION = Operation(
    "Tensors in, tensors out", body=InferBody, reply=dict[str, Any], errors=GENERATES, error=KServeErrorReply
)
_GENERATE_OPERATION = Operation(
    "Text in, text out, as Triton has it", body=dict[str, Any], reply=dict[str, Any], errors=GENERATES,
    error=KServeErrorReply,
)  # fmt: skip
_STREAM_OPERATION = Operation(
    "Text in, events out, as Triton has it", body=dict[str, Any], events=dict[str, Any], errors=GENERATES,
    error=KServeErrorReply,
)  # fmt: skip

ROUTES = [
    *(Endpoint("POST", f"{path}/infer", infer, _INFER_OPERATION) for path in MODEL_PATHS),
    *(Endpoint("POST", f"{path}/generate", generate, _GENERATE_OPERATION) for path in MODEL_PATHS),
    *(
        Endpoint("POST", f"{path}/generate_stream", generate_stream, _STREAM_OPERATION)
        for path in MODEL_PATHS
    ),
]
