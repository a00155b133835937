"""What /v1/responses refuses, by its own names, and how failures reach the client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.api.http.serving import Served
from tests.api.http.test_disconnect import head_and_body
from tests.api.http.test_responses import ASK, PATH, named_events, run

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
MESSAGE = {"type": "message", "role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
SCHEMA = {"type": "json_schema", "name": "n", "schema": {}}

# fields → the field that the error names
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
    ({"input": [MESSAGE | {"extra": 1}]}, "input[0].extra"),
    ({"input": [MESSAGE | {"content": [{"type": "input_image", "image_url": "u"}]}]}, "input[0].content[0].type"),
    ({"input": [MESSAGE | {"content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0].type"),
    ({"input": [MESSAGE | {"content": [{"type": "output_text", "text": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [MESSAGE | {"content": [{"type": "input_text", "text": 5}]}]}, "input[0].content[0].text"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [CALL | {"arguments": "[1]"}]}, "input[0].arguments"),
    ({"input": [CALL | {"arguments": "{"}]}, "input[0].arguments"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ({"input": [MESSAGE] * 5000}, "input"),
    ({"input": "x" * 100_000}, "input"),
    ({"model": "other"}, "model"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools[0].type"),
    ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [TOOL] * 2000}, "tools"),
    ({"tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto",
                                       "tools": [{"type": "function", "name": "g"}]}}, "tool_choice.tools"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"include": ["reasoning.encrypted_content"]}, "include"),
    ({"include": ["secrets"]}, "include"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    ({"max_output_tokens": -1}, "max_output_tokens"),
    ({"max_output_tokens": 1 << 40}, "max_output_tokens"),
    ({"max_output_tokens": 5000}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"background": True, "store": False}, "store"),
    ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    ({"metadata": {"x": "y" * 513}}, "metadata"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"priority": 1 << 40}, "priority"),
    ({"nonsense": 1}, "nonsense"),
]  # fmt: skip


def test_refusals_name_the_field(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        for fields, param in REFUSED:
            for stream in (False, True):
                if stream and param == "stream_options":
                    continue
                reply = await server.post(PATH, ASK | {"stream": stream} | fields)
                status = 404 if param in ("model", "previous_response_id") else 400
                assert reply.status == status, (fields, reply.body)
                error = reply.error()
                assert error["param"] == param and param.split("[")[0] in error["message"], (fields, error)

    run(tmp_path, main)


def test_what_changes_nothing_is_taken(tmp_path: Path) -> None:
    neutral: dict[str, Any] = {
        "service_tier": "auto", "truncation": "disabled", "parallel_tool_calls": True, "tools": [], "background": False,
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "reasoning": {"summary": "auto"}, "user": "u",
        "include": ["file_search_call.results"], "conversation": None, "metadata": None, "max_tool_calls": 3,
        "safety_identifier": "s", "prompt_cache_key": "k", "top_logprobs": 0, "stream": False,
    }  # fmt: skip

    async def main(server: Served) -> int:
        return (await server.post(PATH, ASK | neutral)).status

    assert run(tmp_path, main) == 200


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=101", "order=up", "after=none", "page=2"])
def test_pages_that_are_not_there(tmp_path: Path, query: str) -> None:
    async def main(server: Served) -> None:
        made = (await server.post(PATH, ASK)).json()
        reply = await server.request("GET", f"{PATH}/{made['id']}/input_items?{query}")
        assert (reply.status, reply.error()["param"]) == (400, query.partition("=")[0])

    run(tmp_path, main)


def test_a_failure_in_mid_stream_is_told(tmp_path: Path) -> None:
    async def main(server: Served) -> None:
        body = ASK | {"input": "no end", "deadline_ms": 500}
        events = named_events(await server.post(PATH, body | {"stream": True}))
        assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
        assert events[-2]["code"] == "deadline_exceeded"
        assert events[-1]["response"]["output"][0]["status"] == "incomplete"
        response_id = events[-1]["response"]["id"]
        assert (await server.request("GET", f"{PATH}/{response_id}")).status == 404
        whole = await server.post(PATH, body)
        assert (whole.status, whole.error()["code"]) == (408, "deadline_exceeded")

    run(tmp_path, main, step_delay=0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_request(tmp_path: Path, stream: bool) -> None:
    async def main(server: Served) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head_and_body(PATH, ASK | {"input": "no end", "stream": stream}))
        await server.fake.wait_until(lambda: server.engine.stats().running == 1)
        writer.close()
        await server.fake.wait_idle(seconds=2)

    run(tmp_path, main, step_delay=0.002)
