"""Bad input: a 4xx in OpenAI's shape that names the field, while a stream beside goes on unchanged."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp.test_utils import make_mocked_request

from servd.api.http.context import ARRIVAL
from servd.api.http.generation import time_left
from servd.errors import DeadlineExceededError
from tests.api.http.serving import CHAT, COMPLETIONS, Served, serve
from tests.fakes import TEMPLATE_ERROR

USER = [{"role": "user", "content": "hi"}]

# (path, fields, status, param, part of the message)
BAD: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (COMPLETIONS, {"model": "nope"}, 404, "model", "'nope'"),
    (COMPLETIONS, {"model": "../../etc/passwd"}, 404, "model", "does not exist"),
    (COMPLETIONS, {"model": "x" * 10**6}, 404, "model", "model 'xxx"),
    (COMPLETIONS, {"model": 3}, 400, "model", "model is an integer; allowed: a string or null"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "prompt is empty"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "empty list"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "prompt is empty"),
    (COMPLETIONS, {"prompt": ["a", ""]}, 400, "prompt[1]", "prompt[1] is empty"),
    (COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt", "mixed"),
    (COMPLETIONS, {"prompt": None}, 400, "prompt", "prompt is null"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt", "prompt is an object"),
    (COMPLETIONS, {"prompt": [1.5]}, 400, "prompt[0]", "a number"),
    (COMPLETIONS, {"prompt": [257]}, 400, "prompt", "257; allowed: 0 to 256"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "-1; allowed: 0 to 256"),
    (COMPLETIONS, {"prompt": [[1], [2**70]]}, 400, "prompt[1]", "allowed: 0 to 256"),
    (COMPLETIONS, {"prompt": "x" * 300}, 400, "prompt", "300 tokens"),
    (COMPLETIONS, {"prompt": [1] * 200_000}, 400, "prompt", "200000 tokens"),
    (COMPLETIONS, {"prompt": ["y", "x" * 300]}, 400, "prompt[1]", "300 tokens"),
    (COMPLETIONS, {"prompt": ["a"] * 257}, 400, "prompt", "allowed: at most 256"),
    (COMPLETIONS, {"prompt": ["a"] * 200, "n": 128}, 400, "n", "1024"),
    (COMPLETIONS, {"prompt": ["a"] * 100_000}, 400, "prompt", "allowed: at most 256"),
    (COMPLETIONS, {"max_tokens": -1}, 400, "max_tokens", "max_tokens is -1"),
    (COMPLETIONS, {"max_tokens": 2**63}, 400, "max_tokens", "max_tokens is 9223372036854775808"),
    (COMPLETIONS, {"max_tokens": 10_000}, 400, "max_tokens", "max_tokens is 10000"),
    (COMPLETIONS, {"max_tokens": "5"}, 400, "max_tokens", "max_tokens is a string; allowed: an integer or null"),
    (COMPLETIONS, {"max_tokens": 1.5}, 400, "max_tokens", "max_tokens is a number; allowed: an integer or null"),
    (COMPLETIONS, {"max_tokens": True}, 400, "max_tokens", "true or false"),
    (COMPLETIONS, {"min_tokens": 17}, 400, "min_tokens", "min_tokens is 17"),
    (COMPLETIONS, {"temperature": -0.1}, 400, "temperature", "temperature is -0.1"),
    (COMPLETIONS, {"temperature": float("nan")}, 400, "temperature", "temperature is NaN; allowed: a finite number"),
    (COMPLETIONS, {"temperature": float("-inf")}, 400, "temperature", "temperature is -Infinity; allowed: a finite"),
    (COMPLETIONS, {"temperature": "hot"}, 400, "temperature", "temperature is a string"),
    (COMPLETIONS, {"top_p": 1.5}, 400, "top_p", "top_p is 1.5; allowed: above 0 to 1"),
    (COMPLETIONS, {"top_p": 0}, 400, "top_p", "top_p is 0"),
    (COMPLETIONS, {"top_k": -2}, 400, "top_k", "top_k is -2"),
    (COMPLETIONS, {"min_p": 2}, 400, "min_p", "min_p is 2"),
    (COMPLETIONS, {"presence_penalty": 3}, 400, "presence_penalty", "presence_penalty is 3"),
    (COMPLETIONS, {"frequency_penalty": -3}, 400, "frequency_penalty", "frequency_penalty is -3"),
    (COMPLETIONS, {"repetition_penalty": 0}, 400, "repetition_penalty", "repetition_penalty is 0"),
    (COMPLETIONS, {"seed": 2**63}, 400, "seed", "seed is"),
    (COMPLETIONS, {"n": 0}, 400, "n", "n is 0; allowed: 1 to 128"),
    (COMPLETIONS, {"n": 10**6}, 400, "n", "n is 1000000; allowed: 1 to 128"),
    (COMPLETIONS, {"logprobs": 21}, 400, "logprobs", "logprobs is 21; allowed: 0 to 20"),
    (COMPLETIONS, {"logprobs": True}, 400, "logprobs", "true or false"),
    (COMPLETIONS, {"prompt_logprobs": -1}, 400, "prompt_logprobs", "prompt_logprobs is -1"),
    (COMPLETIONS, {"stop": ["x"] * 17}, 400, "stop", "at most 16"),
    (COMPLETIONS, {"stop": ["x"] * 10**5}, 400, "stop", "at most 16"),
    (COMPLETIONS, {"stop": ""}, 400, "stop", "not empty"),
    (COMPLETIONS, {"stop": [1]}, 400, "stop[0]", "stop[0] is an integer; allowed: a string"),
    (COMPLETIONS, {"stop": "x" * 2000}, 400, "stop", "2000 characters"),
    (COMPLETIONS, {"stop_token_ids": [257]}, 400, "stop_token_ids", "257"),
    (COMPLETIONS, {"stop_token_ids": [1] * 10**5}, 400, "stop_token_ids", "at most 256"),
    (COMPLETIONS, {"logit_bias": {"257": 1}}, 400, "logit_bias", "logit_bias is 257"),
    (COMPLETIONS, {"logit_bias": {"-1": 1}}, 400, "logit_bias", "logit_bias is -1"),
    (COMPLETIONS, {"logit_bias": {"five": 1}}, 400, "logit_bias", "'five'"),
    (COMPLETIONS, {"logit_bias": {"\u0665": 1}}, 400, "logit_bias", "decimal"),
    (COMPLETIONS, {"logit_bias": {"9" * 5000: 1}}, 400, "logit_bias", "decimal"),
    (COMPLETIONS, {"logit_bias": {"5": 101}}, 400, "logit_bias", "101"),
    (COMPLETIONS, {"logit_bias": {"5": "x"}}, 400, "logit_bias", "logit_bias is a string"),
    (COMPLETIONS, {"logit_bias": {"5": float("nan")}}, 400, "logit_bias", "NaN"),
    (COMPLETIONS, {"logit_bias": {str(i): 0 for i in range(2000)}}, 400, "logit_bias", "2000 entries"),
    (COMPLETIONS, {"suffix": "after"}, 400, "suffix", "suffix is"),
    (COMPLETIONS, {"deadline_ms": 0}, 400, "deadline_ms", "deadline_ms is 0"),
    (COMPLETIONS, {"priority": 2**40}, 400, "priority", "priority is"),
    (COMPLETIONS, {"priority": 1}, 400, "priority", "priority is 1; allowed: 0, unless"),
    (COMPLETIONS, {"cache_salt": ""}, 400, "cache_salt", "0 characters"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
    (COMPLETIONS, {"stream": "yes"}, 400, "stream", "stream is a string; allowed: true or false or null"),
    (COMPLETIONS, {"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "not a field"),
    (COMPLETIONS, {"service_tier": "flex"}, 400, "service_tier", '"flex"'),
    (COMPLETIONS, {"messages": USER}, 400, "messages", "not a field"),
    (CHAT, {"messages": []}, 400, "messages", "messages is empty"),
    (CHAT, {"messages": None}, 400, "messages", "messages is null; allowed: an array"),
    (CHAT, {"messages": "hi"}, 400, "messages", "messages is a string"),
    (CHAT, {"messages": [{"role": "user"}] * 5000}, 400, "messages", "5000 entries"),
    (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0].role", "missing"),
    (CHAT, {"messages": [*USER, {"role": "robot", "content": "x"}]}, 400,
     "messages[1].role", "'robot'; allowed: system"),
    (CHAT, {"messages": [{"role": 7, "content": "x"}]}, 400, "messages[0].role", "an integer"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "null"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "an integer"),
    (CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, 400, "messages[0].content[0]", "a string"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]}, 400,
     "messages[0].content[0].type", "'image_url'; allowed: 'text'"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400,
     "messages[0].content[0].text", "missing"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 2500}] * 2}, 400, "messages",
     "5000 content parts"),
    (CHAT, {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, 400, "messages[0].content[0].type", "missing"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "weight": 1}]}, 400, "messages[0].weight", "not a field"),
    (CHAT, {"messages": [{"role": "user", "content": TEMPLATE_ERROR}]}, 400, "messages", "template"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages", "tokens"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]}, 400,
     "messages[0].tool_calls[0].function.arguments", "JSON object"),
    (CHAT, {"max_completion_tokens": -5}, 400, "max_completion_tokens", "max_completion_tokens is -5"),
    (CHAT, {"max_completion_tokens": 5000}, 400, "max_completion_tokens", "max_completion_tokens is 5000"),
    (CHAT, {"max_completion_tokens": 5, "max_tokens": 6}, 400, "max_completion_tokens", "max_tokens (6)"),
    (CHAT, {"logprobs": 2}, 400, "logprobs", "logprobs is an integer"),
    (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "top_logprobs is 21; allowed: 0 to 20"),
    (CHAT, {"tool_choice": "required"}, 400, "tool_choice", "allowed: with tools"),
    (CHAT, {"response_format": 99999999999999999999999}, 400, "response_format", "allowed: an object"),
    (CHAT, {"functions": [{}]}, 400, "functions", "does not honour"),
    (CHAT, {"function_call": "auto"}, 400, "function_call", '"auto"'),
    (CHAT, {"modalities": ["text", "audio"]}, 400, "modalities", "audio"),
    (CHAT, {"audio": {"voice": "alloy"}}, 400, "audio", "alloy"),
    (CHAT, {"prediction": {"type": "content"}}, 400, "prediction", "content"),
    (CHAT, {"store": True}, 400, "store", "store is true; servd does not honour it; allowed: null or false"),
    (CHAT, {"web_search_options": {}}, 400, "web_search_options", "does not honour"),
    (CHAT, {"reasoning_effort": "high"}, 400, "reasoning_effort", "high"),
    (CHAT, {"verbosity": "low"}, 400, "verbosity", "low"),
    (CHAT, {"continue_final_message": True}, 400, "continue_final_message", "a last message of role assistant"),
    (CHAT, {"chat_template": "{{ x }}"}, 400, "chat_template", "does not honour"),
    (CHAT, {"chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs", "'tokenize'"),
    (CHAT, {"metadata": {"a": 1}}, 400, "metadata", "metadata is an integer; allowed: a string"),
    ("/tokenize", {"prompt": 3}, 400, "prompt", "an integer"),
    ("/tokenize", {"prompt": None}, 400, "prompt", "exactly one"),
    ("/detokenize", {"tokens": [1, 999]}, 400, "tokens", "999"),
    ("/detokenize", {"tokens": "x"}, 400, "tokens", "a string"),
]  # fmt: skip


def body_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        COMPLETIONS: {"model": "fake", "prompt": "hi"},
        CHAT: {"model": "fake", "messages": USER},
    }
    return defaults.get(path, {}) | fields


def test_bad_fields_are_named_while_a_stream_beside_goes_on(tmp_path: Path) -> None:
    async def canary(server: Served) -> str:
        body = {"prompt": "canary", "max_tokens": 200, "temperature": 0, "stream": True}
        events = (await server.post(COMPLETIONS, body)).events()
        return "".join(event["choices"][0]["text"] for event in events[:-1])

    async def main() -> None:
        async with serve(tmp_path, max_position_embeddings=256, step_delay=0.001) as server:
            expected = await canary(server)
            beside = asyncio.create_task(canary(server))
            problems = []
            for path, fields, status, param, text in BAD:
                reply = await server.post(path, body_of(path, fields))
                shown = f"{path} {json.dumps(fields)[:100]}: {reply.status} {reply.body[:300]!r}"
                error = reply.error()
                if (reply.status, error["param"]) != (status, param) or text not in error["message"]:
                    problems.append(shown)
                assert len(reply.body) < 3000, "what the client sent is not echoed in full"
                if beside.done():
                    assert await beside == expected
                    beside = asyncio.create_task(canary(server))
            assert not problems, "\n".join(problems)
            assert await beside == expected
            assert not [p for p in server.executor.plans for n in p.new_requests if n.num_prompt_tokens != 6], (
                "no bad request reached the scheduler"
            )

    asyncio.run(main())


def test_error_types_and_codes(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            unsupported = (await server.post(CHAT, body_of(CHAT, {"store": True}))).error()
            assert (unsupported["type"], unsupported["code"]) == ("invalid_request_error", "unsupported_parameter")
            wrong = (await server.post(COMPLETIONS, body_of(COMPLETIONS, {"top_p": 7}))).error()
            assert (wrong["type"], wrong["code"]) == ("invalid_request_error", "invalid_value")
            missing = (await server.request("GET", "/v1/models/none/such")).error()
            assert missing["code"] == "model_not_found"

    asyncio.run(main())


def test_the_openai_client_raises_its_own_exceptions(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server, server.openai() as client:
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="nope", prompt="x")
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(model="fake", prompt="x", top_p=1.5)
            assert caught.value.param == "top_p"

    asyncio.run(main())


def test_an_unexpected_error_is_a_500_without_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            def broken(*_: object, **__: object) -> None:
                raise RuntimeError(f"secret at /home/me and {object()!r}")

            with monkeypatch.context() as patch:
                patch.setattr(server.engine, "generate", broken)
                reply = await server.post(COMPLETIONS, body_of(COMPLETIONS, {}))
            assert reply.status == 500
            error = reply.error()
            assert "secret" not in error["message"] and "0x" not in error["message"]
            assert error["type"] == "server_error"
            assert (await server.post(COMPLETIONS, body_of(COMPLETIONS, {}))).status == 200

    asyncio.run(main())


def test_a_deadline_counts_from_arrival_and_may_pass_while_the_prompt_is_read() -> None:
    request = make_mocked_request("POST", COMPLETIONS)
    request[ARRIVAL] = time.monotonic() - 3600
    left = time_left(request, 2 * 3600_000, "prompt")
    assert left is not None and left <= 3600
    with pytest.raises(DeadlineExceededError, match="deadline_ms of 3599000 passed before the prompt was read"):
        time_left(request, 3599_000, "prompt")
    assert time_left(request, None, "prompt") is None
