"""Random and mutated messages to every call of both services: no INTERNAL, no hang, a stream beside them unchanged.

Messages are made from the descriptors, so that new calls and fields are covered; seeded.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from servd.api.grpc._pb.inference import grpc_service_pb2 as kserve
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from tests.api.grpc.grpc_helpers import Served, run, served, text_of

Code = grpc.StatusCode
NUM_MESSAGES = 400  # a call: 10,000 in all
EXPECTED = {
    Code.OK, Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.NOT_FOUND, Code.DEADLINE_EXCEEDED,
    Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE,
}  # fmt: skip
NUMBERS = (0, 1, 2, 3, 5, 20, 255, 257, (1 << 31) - 1)
FLOATS = (0.0, 0.5, 1.0, -1.0, 2.0, 1e30, float("nan"), float("inf"), -0.0)
TEXTS = (
    "", "a", "user", "assistant", "tool", "fake", "Hello", "\0", "\U0001f5fc", "x" * 300, "{}", '{"type": "object"}',
    "[", "text_input", "sampling_parameters", "BYTES", "BOOL", '{"max_tokens": 3}', '{"n": "a"}', "1", "max_tokens",
)  # fmt: skip
BLOBS = (b"", b"\1", b"\0\0\0\0", b"\2\0\0\0Hi", b"\xff\xff\xff\xff", b"\x03\0\0\0{}\n", b"\xff" * 40)


def random_message(random: random.Random, descriptor: Descriptor, depth: int = 0) -> Message:
    """A message with some of its fields set to values at and beyond their limits."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if random.random() < (0.5 if depth == 0 else 0.4) and depth < 5:
            _set_field(random, message, field, depth)
    return message


def _set_field(random: random.Random, message: Any, field: FieldDescriptor, depth: int) -> None:
    count = random.choice((1, 1, 2, 3))
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key_field, value_field = field.message_type.fields
        for _ in range(count):
            key = _scalar(random, key_field)
            if value_field.message_type is None:
                getattr(message, field.name)[key] = _scalar(random, value_field)
            else:
                made = random_message(random, value_field.message_type, depth + 1)
                getattr(message, field.name)[key].CopyFrom(made)
    elif field.is_repeated:
        values = getattr(message, field.name)
        for _ in range(count):
            if field.message_type is None:
                values.append(_scalar(random, field))
            else:
                values.append(random_message(random, field.message_type, depth + 1))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(random_message(random, field.message_type, depth + 1))
    elif field.name in ("model", "model_name"):
        setattr(message, field.name, random.choice(("", "fake", "fake", "other")))
    else:
        setattr(message, field.name, _scalar(random, field))


def _scalar(random: random.Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return random.choice(BLOBS if field.type == FieldDescriptor.TYPE_BYTES else TEXTS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return random.choice(FLOATS)
        case FieldDescriptor.CPPTYPE_ENUM:
            return random.choice((0, 1, 2, 3, 77))
        case FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64:
            return random.choice(NUMBERS)
        case _:
            return random.choice((*NUMBERS, -1, -(1 << 31)))


async def outcome(s: Served, method: Any, data: bytes) -> Code:
    """Send bytes, as they are, to a method; how the call ended."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kinds = {
        (False, False): s.channel.unary_unary, (False, True): s.channel.unary_stream,
        (True, True): s.channel.stream_stream,
    }  # fmt: skip
    start = kinds[method.client_streaming, method.server_streaming](path)
    call: Any = start(iter([data]) if method.client_streaming else data, timeout=2.0)  # type: ignore[operator]
    try:
        if method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        code: Code = error.code()
        return code
    return Code.OK


def test_random_messages_to_every_call(tmp_path: Path) -> None:
    services = [pb.DESCRIPTOR.services_by_name["Inference"]]
    services += [kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"]]
    methods = [method for service in services for method in service.methods]
    source = random.Random(5)

    async def test() -> None:
        async with served(tmp_path, max_position_embeddings=64) as s:

            async def one(method: Any) -> None:
                message = random_message(source, method.input_type)
                data = bytearray(message.SerializeToString())
                if data and source.random() < 0.3:
                    data[source.randrange(len(data))] = source.randrange(256)
                code = await outcome(s, method, bytes(data))
                assert code in EXPECTED, f"{method.full_name}: {code.name} for {bytes(data)!r}"

            alone = await text_of(s.generate("canary", temperature=0.0, max_tokens=50))
            for _ in range(NUM_MESSAGES):
                canary = asyncio.create_task(text_of(s.generate("canary", temperature=0.0, max_tokens=50)))
                await asyncio.gather(*(one(method) for method in methods))
                assert await canary == alone
            for prefix in (await s.stub.ListPrefixes(pb.ListPrefixesRequest())).prefixes:
                await s.stub.DeletePrefix(pb.DeletePrefixRequest(id=prefix.id))
            await s.fake.wait_idle()

    run(test)
