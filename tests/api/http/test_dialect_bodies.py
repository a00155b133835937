"""Mutated bodies of /v1/responses and /v1/messages: answered or refused, never a 5xx; answers do not depend on cuts."""

from __future__ import annotations

import asyncio
import copy
import random
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from servd.api.chat.parts import Part
from servd.api.http.anthropic.answer import MessageAnswer
from servd.api.http.responses.answer import ResponseAnswer, usage_dict
from servd.outputs import RequestOutput
from servd.request import FinishReason
from tests.api.http.serving import COMPLETIONS
from tests.api.http.test_messages import ASK as ASK_MESSAGE
from tests.api.http.test_messages import COUNT, TOOL
from tests.api.http.test_messages import PATH as MESSAGES
from tests.api.http.test_messages import run as run_server
from tests.api.http.test_responses import ASK as ASK_RESPONSE
from tests.api.http.test_responses import PATH as RESPONSES
from tests.api.http.test_responses import REPLIES, Served, TagReader

CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "fc_1", "status": "completed"}
FULL_RESPONSE: dict[str, Any] = ASK_RESPONSE | {
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}, CALL,
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
    ],
    "instructions": "x", "max_output_tokens": 5, "temperature": 1.0, "metadata": {"a": "b"}, "store": True,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "include": ["file_search_call.results"], "top_logprobs": 0,
    "reasoning": {"effort": None, "summary": "auto"}, "background": False, "stream": False, "user": "u",
}  # fmt: skip
FULL_MESSAGE: dict[str, Any] = ASK_MESSAGE | {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": ""},
                                          {"type": "tool_use", "id": "c", "name": "f", "input": {"a": [1]}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x", "is_error": True}]},
    ],
    "system": [{"type": "text", "text": "x"}], "max_tokens": 5, "tools": [TOOL], "stop_sequences": ["x"],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "top_k": 3, "output_config": {"effort": None},
    "thinking": {"type": "adaptive"}, "metadata": {"user_id": "u"}, "stream": False,
}  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 1 << 62, 1.5, -1e308, "", "x", "\x00", "none", "auto", [], [None], ["x"], [[]], {},
    {"type": "x"}, {"type": None}, [{"type": "text"}], {"": {}}, "x" * 5000,
]  # fmt: skip


def mutated(body: dict[str, Any], choice: random.Random) -> dict[str, Any]:
    """A copy in which some values, at any depth, are others, gone, or doubled."""
    body = copy.deepcopy(body)
    for _ in range(choice.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        stack: list[Any] = [body]
        while stack:
            node = stack.pop()
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            places += [(node, key) for key in keys]
            stack += [node[key] for key in keys if isinstance(node[key], (dict, list))]
        node, key = choice.choice(places)
        match choice.randrange(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[choice.choice(["type", "id", "text", "extra"])] = node[key]
            case _:
                node[key] = choice.choice(VALUES)
        if not body:
            break
    return body


def test_mutated_bodies_are_answered_or_refused(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        choice = random.Random(5)
        canary = {"prompt": "canary", "max_tokens": 200, "temperature": 0}
        expected = (await server.post(COMPLETIONS, canary)).json()["choices"]
        statuses: dict[int, int] = {}
        for _ in range(15):
            beside = asyncio.create_task(server.post(COMPLETIONS, canary))
            calls = []
            for _ in range(20):
                calls.append(server.post(RESPONSES, mutated(FULL_RESPONSE, choice)))
                calls.append(server.post(MESSAGES, mutated(FULL_MESSAGE, choice)))
                calls.append(server.post(COUNT, mutated(FULL_MESSAGE, choice)))
            for reply in await asyncio.gather(*calls):
                statuses[reply.status] = statuses.get(reply.status, 0) + 1
                assert reply.status in (200, 400, 404), reply.body
            assert (await beside).json()["choices"] == expected
        await server.fake.wait_idle()
        assert statuses[400] > 300 and statuses[200] > 20, statuses

    run_server(tmp_path, main)


@given(st.lists(st.integers(0, len(REPLIES["weather"])), max_size=12))
def test_answers_do_not_depend_on_how_their_text_is_cut(cuts: list[int]) -> None:
    def made(cuts: list[int]) -> tuple[Any, Any]:
        reader, text = TagReader(), REPLIES["weather"]
        response, message = ResponseAnswer({"id": "resp_x", "store": True}), MessageAnswer("msg-x", "fake")
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            parts: list[Part] = reader.push(text[begin:end])
            response.add(parts)
            message.add(parts)
        response.finish(FinishReason.STOP, usage_dict(1, 0, 1, 0))
        message.finish(RequestOutput("x", 0, finish_reason=FinishReason.STOP), thinking_tokens=0)
        return response.as_dict()["output"], message.as_dict()["content"]

    assert made(sorted(cuts)) == made([])
