"""Chat with tools, reasoning and formats: what a call carries reaches the plan, and its parts come back as fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2

from servd.api.chat.call import AnswerFormat, ChatCall, Tool, ToolChoice
from servd.api.chat.parts import Part, ReasoningPart, TextPart, ToolCallPart
from servd.api.chat.plan import ChatPlan
from servd.api.grpc import generation
from servd.api.grpc._pb.servd.v1 import inference_pb2 as pb
from servd.api.service import InferenceService
from tests.api.grpc.grpc_helpers import blamed_field, error_of, run, served

USER = pb.ChatMessage(role="user", content="Hi")


class LineReader:
    """Lines that begin with '?' are thoughts, those with '!' arguments of a call, others text; cut at newlines."""

    def __init__(self) -> None:
        self._held = ""
        self._num_calls = 0

    def push(self, text: str) -> list[Part]:
        *lines, self._held = (self._held + text).split("\n")
        return [self._part(line) for line in lines]

    def finish(self) -> list[Part]:
        held, self._held = self._held, ""
        return [self._part(held)] if held else []

    def _part(self, line: str) -> Part:
        if line.startswith("?"):
            return ReasoningPart(line[1:])
        if line.startswith("!"):
            self._num_calls += 1
            return ToolCallPart(self._num_calls - 1, line[1:], id=f"call-{self._num_calls}", name="look")
        return TextPart(line)


def plan_with(reader: Callable[[], Any] | None, seen: list[ChatCall]) -> Any:
    async def plan(service: InferenceService, call: ChatCall) -> ChatPlan:
        seen.append(call)
        return ChatPlan(list(b"prompt"), call.params, reader)

    return plan


def test_parts_of_an_answer_come_in_fields_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "plan_chat", plan_with(LineReader, []))
    reply = '?thinking\nwell\n!{"x": 1}\n!{}\n'

    async def test() -> None:
        async with served(tmp_path, executor_options={"replies": {"prompt": reply}}) as s:
            chunks = [chunk async for chunk in s.stub.Chat(pb.ChatRequest(messages=[USER]))]
            assert "".join(chunk.text for chunk in chunks) == "well"
            assert "".join(chunk.reasoning for chunk in chunks) == "thinking"
            calls = [(c.index, c.id, c.name, c.arguments) for chunk in chunks for c in chunk.tool_calls]
            assert calls == [(0, "call-1", "look", '{"x": 1}'), (1, "call-2", "look", "{}")]
            assert chunks[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS
            assert sum(len(chunk.token_ids) for chunk in chunks) == len(reply) + 1

    run(test)


def test_what_a_call_carries_reaches_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ChatCall] = []
    monkeypatch.setattr(generation, "plan_chat", plan_with(None, seen))
    request = pb.ChatRequest(
        messages=[
            USER,
            pb.ChatMessage(
                role="assistant",
                reasoning="hm",
                tool_calls=[pb.ToolCall(id="c1", name="look", arguments='{"x": [1, 2.5]}')],
            ),
            pb.ChatMessage(role="tool", content="found", tool_call_id="c1"),
        ],
        tools=[
            pb.Tool(name="look", description="Looks.", parameters='{"type": "object"}', strict=True),
            pb.Tool(name="wait"),
        ],
        tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED, name="look", parallel=False),
        sampling_params=pb.SamplingParams(regex="a+", max_tokens=2),
        add_generation_prompt=False,
        continue_final_message=True,
    )

    async def test() -> None:
        async with served(tmp_path) as s:
            assert [chunk async for chunk in s.stub.Chat(request)]
            (call,) = seen
            assert call.messages == [
                {"role": "user", "content": "Hi"},
                {
                    "role": "assistant", "content": "", "reasoning_content": "hm",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"x": [1, 2.5]}}}
                    ],
                },
                {"role": "tool", "content": "found", "tool_call_id": "c1"},
            ]  # fmt: skip
            assert call.tools == (Tool("look", "Looks.", {"type": "object"}, True), Tool("wait"))
            assert call.tool_choice == ToolChoice("required", "look", parallel=False)
            assert call.answer_format == AnswerFormat("regex", "a+", "sampling_params.regex")
            assert (call.add_generation_prompt, call.continue_final_message) == (False, True)

    run(test)


def struct_of(values: dict[str, Any]) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update(values)
    return made


def asked(**fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[USER], **fields)


WRONG: dict[str, tuple[pb.ChatRequest, str]] = {
    "parameters no object": (asked(tools=[pb.Tool(name="a", parameters="[]")]), "tools[0].parameters"),
    "parameters no JSON": (asked(tools=[pb.Tool(name="a", parameters="{")]), "tools[0].parameters"),
    "parameters nested": (asked(tools=[pb.Tool(name="a", parameters='{"a":' * 100_000)]), "tools[0].parameters"),
    "unknown mode": (asked(tool_choice=pb.ToolChoice(mode=9)), "tool_choice.mode"),  # type: ignore[arg-type]
    "name without need": (asked(tool_choice=pb.ToolChoice(name="a")), "tool_choice.name"),
    "arguments no JSON": (
        pb.ChatRequest(messages=[pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="1", name="a")])]),
        "messages[0].tool_calls[0].arguments",
    ),
    "too many calls": (
        pb.ChatRequest(
            messages=[pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(name="a", arguments="{}")] * 5000)]
        ),
        "messages",
    ),
    "schema no JSON": (
        asked(sampling_params=pb.SamplingParams(json_schema="nonsense")), "sampling_params.json_schema"
    ),
    "json_object false": (
        asked(sampling_params=pb.SamplingParams(json_object=False)), "sampling_params.json_object"
    ),
    "a name that the server sets": (asked(chat_template_kwargs=struct_of({"messages": []})), "chat_template_kwargs"),
    "variables without end": (
        asked(chat_template_kwargs=struct_of({"x": [1] * 20_000})), "chat_template_kwargs"
    ),
    "goes on and begins": (
        asked(continue_final_message=True, add_generation_prompt=True), "continue_final_message"
    ),
    "keep no token": (asked(truncate_prompt_tokens=0), "truncate_prompt_tokens"),
    "unknown effort": (asked(reasoning_effort="enormous"), "reasoning_effort"),
    "long salt": (asked(cache_salt="x" * 300), "cache_salt"),
    "odd request id": (asked(request_id="a b"), "request_id"),
    "long request id": (asked(request_id="a" * 129), "request_id"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_chat_names_the_field(case: str, tmp_path: Path) -> None:
    request, field = WRONG[case]

    async def test() -> None:
        async with served(tmp_path) as s:
            error = await error_of(s.stub.Chat(request))
            assert (error.code(), blamed_field(error)) == (grpc.StatusCode.INVALID_ARGUMENT, field)
            await s.fake.wait_idle()

    run(test)


@pytest.mark.parametrize(
    "kind, text", [("regex", "("), ("grammar", "start: nobody"), ("json_schema", '{"type": "nonsense"}')]
)
def test_a_grammar_that_cannot_be_followed_is_refused_by_its_field(kind: str, text: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            error = await error_of(s.generate(**{kind: text}))
            assert (error.code(), blamed_field(error)) == (
                grpc.StatusCode.INVALID_ARGUMENT, f"sampling_params.{kind}"
            )  # fmt: skip
            await s.fake.wait_idle()

    run(test)


def test_an_empty_choice_is_refused_by_generate(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as s:
            error = await error_of(s.generate(choice=pb.Choice()))
            assert blamed_field(error) == "sampling_params.choice"

    run(test)
