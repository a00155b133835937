"""Wrong input, overload, deadlines, cancellation: the right status, the field named, nothing left running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import struct_pb2
from google.rpc import error_details_pb2

from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.config import ServerConfig
from tests.api.grpc.grpc_helpers import Served, blamed_field, error_of, run, served, status_of, text_of
from tests.fakes import TEMPLATE_ERROR

Code = grpc.StatusCode
USER = pb.ChatMessage(role="user", content="Hi")
NOT_FINITE = struct_pb2.Struct(fields={"depth": struct_pb2.Value(number_value=float("nan"))})


def sampled(**sampling: Any) -> Callable[[Served], Any]:
    return lambda s: s.generate(**sampling)


def prompted(**prompt: Any) -> Callable[[Served], Any]:
    return lambda s: s.stub.Generate(pb.GenerateRequest(**prompt))


def chatted(*messages: pb.ChatMessage) -> Callable[[Served], Any]:
    return lambda s: s.stub.Chat(pb.ChatRequest(messages=messages))


WRONG: dict[str, tuple[Callable[[Served], Any], str]] = {
    "temperature nan": (sampled(temperature=float("nan")), "sampling_params.temperature"),
    "temperature inf": (sampled(temperature=float("inf")), "sampling_params.temperature"),
    "temperature negative": (sampled(temperature=-0.1), "sampling_params.temperature"),
    "top_p 1.5": (sampled(top_p=1.5), "sampling_params.top_p"),
    "top_p 0": (sampled(top_p=0.0), "sampling_params.top_p"),
    "top_k negative": (sampled(top_k=-1), "sampling_params.top_k"),
    "n 0": (sampled(n=0), "sampling_params.n"),
    "max_tokens negative": (sampled(max_tokens=-1), "sampling_params.max_tokens"),
    "max_tokens too many": (sampled(max_tokens=200), "sampling_params.max_tokens"),
    "min_tokens above max_tokens": (sampled(min_tokens=5, max_tokens=4), "sampling_params.min_tokens"),
    "logprobs 21": (sampled(logprobs=21), "sampling_params.logprobs"),
    "logit_bias out of the vocabulary": (sampled(logit_bias={257: 1.0}), "sampling_params.logit_bias"),
    "logit_bias nan": (sampled(logit_bias={2: float("nan")}), "sampling_params.logit_bias"),
    "empty stop": (sampled(stop=[""]), "sampling_params.stop"),
    "stop token out of the vocabulary": (sampled(stop_token_ids=[1 << 31]), "sampling_params.stop_token_ids"),
    "no prompt": (prompted(), "prompt"),
    "empty text": (prompted(text=""), "text"),
    "empty ids": (prompted(token_ids=pb.TokenIds()), "token_ids"),
    "id out of the vocabulary": (prompted(token_ids=pb.TokenIds(ids=[257])), "token_ids"),
    "millions of ids": (prompted(token_ids=pb.TokenIds(ids=[1] * 4_000_000)), "token_ids"),
    "prompt too long": (prompted(text="x" * 128), "text"),
    "no messages": (chatted(), "messages"),
    "unknown role": (chatted(USER, pb.ChatMessage(role="wizard", content="x")), "messages[1].role"),
    "template refuses": (chatted(pb.ChatMessage(role="user", content=TEMPLATE_ERROR)), "messages"),
    "template variable not finite": (
        lambda s: s.stub.Chat(pb.ChatRequest(messages=[USER], chat_template_kwargs=NOT_FINITE)), "chat_template_kwargs"
    ),
    "too many messages": (chatted(*[USER] * 5000), "messages"),
    "chat too long": (chatted(pb.ChatMessage(role="user", content="x" * 200)), "messages"),
    "detokenize out of the vocabulary": (
        lambda s: s.stub.Detokenize(pb.DetokenizeRequest(token_ids=[999])), "token_ids"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_names_the_field_and_disturbs_nobody(case: str, tmp_path: Path) -> None:
    async def test() -> None:
        call, field = WRONG[case]
        async with served(tmp_path, max_position_embeddings=128) as s:
            alone = await text_of(s.generate("canary", temperature=0.0, max_tokens=30))
            canary = asyncio.create_task(text_of(s.generate("canary", temperature=0.0, max_tokens=30)))
            error = await error_of(call(s))
            assert error.code() == Code.INVALID_ARGUMENT
            assert blamed_field(error) == field
            assert status_of(error).message == error.details()
            assert await canary == alone
            await s.fake.wait_idle()

    run(test)


@pytest.mark.parametrize("method", ["Generate", "Chat", "Tokenize", "Detokenize"])
def test_an_unknown_model_is_not_found(method: str, tmp_path: Path) -> None:
    async def test() -> None:
        requests = {
            "Generate": pb.GenerateRequest(model="gpt-5", text="x"),
            "Chat": pb.ChatRequest(model="gpt-5", messages=[USER]),
            "Tokenize": pb.TokenizeRequest(model="gpt-5"),
            "Detokenize": pb.DetokenizeRequest(model="gpt-5"),
        }
        async with served(tmp_path) as s:
            error = await error_of(getattr(s.stub, method)(requests[method]))
            assert error.code() == Code.NOT_FOUND
            assert "gpt-5" in str(error.details())
            info = error_details_pb2.ErrorInfo()
            assert status_of(error).details[0].Unpack(info)
            assert (info.reason, info.domain) == ("MODEL_NOT_FOUND", "servd")

    run(test)


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, settings={"max_num_seqs": 1, "max_num_queued_reqs": 1}) as s:
            s.fake.executor.gate.clear()
            running = s.generate(max_tokens=2)
            await s.fake.wait_until(lambda: s.fake.engine.stats().running == 1)
            waiting = s.generate(max_tokens=2)
            await s.fake.wait_until(lambda: s.fake.engine.stats().waiting == 1)
            error = await error_of(s.generate(max_tokens=2))
            assert error.code() == Code.RESOURCE_EXHAUSTED
            retry = error_details_pb2.RetryInfo()
            assert status_of(error).details[1].Unpack(retry)
            assert retry.retry_delay.ToNanoseconds() > 0
            s.fake.executor.gate.set()
            assert len(await text_of(running)) == len(await text_of(waiting)) == 2

    run(test)


def test_a_passed_deadline_frees_the_request(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"step_delay": 0.01}) as s:
            error = await error_of(s.generate(max_tokens=1500, timeout=0.15))
            assert error.code() == Code.DEADLINE_EXCEEDED
            await s.fake.wait_idle(1.0)

    run(test)


def test_the_deadline_reaches_a_request_that_still_waits(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, settings={"max_num_seqs": 1}) as s:
            s.fake.executor.gate.clear()
            running = s.generate(max_tokens=2)
            await s.fake.wait_until(lambda: s.fake.engine.stats().running == 1)
            error = await error_of(s.generate(max_tokens=2, timeout=0.1))
            assert error.code() == Code.DEADLINE_EXCEEDED
            await s.fake.wait_until(lambda: s.fake.engine.stats().waiting == 0, 1.0)
            s.fake.executor.gate.set()
            assert len(await text_of(running)) == 2

    run(test)


@pytest.mark.parametrize("num_read", [0, 3])
def test_a_cancelled_call_frees_the_request(num_read: int, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"step_delay": 0.002}) as s:
            for _ in range(20):
                call = s.generate(max_tokens=1500)
                for _ in range(num_read):
                    await call.read()
                call.cancel()
            await s.fake.wait_idle()
            assert s.fake.engine.stats().kv_blocks_used == 0

    run(test)


def test_a_client_that_does_not_read_is_cancelled_too(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            call = s.generate(max_tokens=1900, logprobs=20)  # far more than flow control lets through
            await call.read()
            await asyncio.sleep(0.2)
            call.cancel()
            await s.fake.wait_idle()

    run(test)


def test_a_lost_connection_frees_the_request(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, executor_options={"step_delay": 0.002}) as s:
            call = s.generate(max_tokens=1500)
            await call.read()
            await s.channel.close()
            await s.fake.wait_idle()

    run(test)


def test_a_request_that_fails_fails_alone(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            s.fake.executor.gate.clear()
            call = s.generate(max_tokens=100)
            await s.fake.wait_until(lambda: s.fake.engine.stats().running == 1)
            s.fake.engine._end_all(*_closing())
            s.fake.executor.gate.set()
            error = await error_of(call)
            assert (error.code(), error.details()) == (Code.UNAVAILABLE, "going down")
            assert len(await text_of(s.generate(max_tokens=3))) == 3

    run(test)


def _closing() -> tuple[Any, Any]:
    from servd.errors import EngineUnavailableError
    from servd.request import FinishReason

    return FinishReason.ABORT, EngineUnavailableError("going down")


def test_what_was_not_raised_on_purpose_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:

            def broken(*args: object) -> list[int]:
                raise KeyError("secret")

            monkeypatch.setattr(s.fake.engine.tokenizer, "encode", broken)
            error = await error_of(s.stub.Tokenize(pb.TokenizeRequest(text="x")))
            assert error.code() == Code.INTERNAL
            assert "secret" not in str(error.details())

    run(test)


@pytest.mark.parametrize("quoted", ["x" * 100_000, "\U0001f30d" * 5000, "\r\n\0" * 5000])
def test_an_error_that_quotes_the_client_at_length_still_arrives(quoted: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            error = await error_of(s.stub.Tokenize(pb.TokenizeRequest(model=quoted)))
            assert error.code() == Code.NOT_FOUND
            assert str(error.details()).startswith("model '")
            assert status_of(error).message == error.details()
            error = await error_of(s.stub.Chat(pb.ChatRequest(messages=[pb.ChatMessage(role=quoted, content="x")])))
            assert error.code() == Code.INVALID_ARGUMENT
            assert blamed_field(error) == "messages[0].role"

    run(test)


def test_a_priority_that_the_policy_ignores_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            error = await error_of(s.stub.Generate(pb.GenerateRequest(text="x", priority=1)))
            assert error.code() == Code.UNIMPLEMENTED
            assert blamed_field(error) == "priority"

    run(test)


def test_a_message_over_the_limit_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, server_config=ServerConfig(grpc_port=0, max_body_bytes=10_000)) as s:
            error = await error_of(s.stub.Tokenize(pb.TokenizeRequest(text="x" * 20_000)))
            assert error.code() == Code.RESOURCE_EXHAUSTED
            assert len((await s.stub.Tokenize(pb.TokenizeRequest(text="x" * 9_000))).token_ids) == 9_000

    run(test)
