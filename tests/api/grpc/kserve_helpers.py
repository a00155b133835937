"""Requests and replies of inference.GRPCInferenceService as its published clients make and read them.

Knows nothing of what is tested.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from servd.api.grpc._pb.inference import grpc_service_pb2 as pb
from servd.api.grpc._pb.inference import grpc_service_pb2_grpc as pb_grpc
from tests.api.grpc.grpc_helpers import MODEL, Served

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
