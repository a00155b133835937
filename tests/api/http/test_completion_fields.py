"""Further fields of /v1/completions, OpenAI's and vLLM's: beams, best_of, forms, truncation; what is refused."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from servd.config import ServerConfig
from servd.engine import guidance
from servd.sampling_params import SamplingParams
from tests.api.http.serving import CHAT, COMPLETIONS, Served, serve
from tests.api.http.test_completions import REPLIES, ask, completion

BEAMS: dict[str, Any] = {"prompt": "count", "max_tokens": 6, "use_beam_search": True, "return_token_ids": True}


def worker_params(folder: Path, body: dict[str, Any]) -> SamplingParams:
    """The settings with which the body's one request reaches the worker."""

    async def main() -> SamplingParams:
        async with serve(folder, replies=REPLIES) as server:
            await completion(server, body)
            return server.executor.plans[0].new_requests[0].sampling_params

    return asyncio.run(main())


async def streamed(server: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a streamed completion."""
    reply = await server.post(COMPLETIONS, body | {"stream": True})
    assert reply.status == 200, reply.body
    *chunks, done = reply.events()
    assert done == "[DONE]"
    return chunks


# -- beam search and best_of ---------------------------------------------------------------------------------------


def test_beams_are_returned_best_first(tmp_path: Path) -> None:
    reply = ask(tmp_path, BEAMS | {"n": 2, "best_of": 4, "logprobs": 1})
    first, second = reply["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["text"].encode() == bytes(first["token_ids"]) and len(first["token_ids"]) == 6
    assert first["token_ids"] != second["token_ids"]
    totals = [sum(choice["logprobs"]["token_logprobs"]) for choice in (first, second)]
    assert totals[0] >= totals[1]
    assert reply["usage"]["completion_tokens"] == 12


def test_beams_of_several_prompts_are_numbered_prompt_by_prompt(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            both = await completion(server, BEAMS | {"prompt": ["one", "two"], "n": 2})
            one, two = [await completion(server, BEAMS | {"prompt": text, "n": 2}) for text in ("one", "two")]
            expected = [choice["token_ids"] for reply in (one, two) for choice in reply["choices"]]
            assert [choice["token_ids"] for choice in both["choices"]] == expected

    asyncio.run(main())


def test_a_streamed_beam_search_comes_whole_at_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            body = BEAMS | {"n": 2, "best_of": 3}
            whole = await completion(server, body)
            *chunks, usage = await streamed(server, body | {"stream_options": {"include_usage": True}})
            assert len(chunks) == 2
            shown = {chunk["choices"][0]["index"]: chunk["choices"][0] for chunk in chunks}
            for choice in whole["choices"]:
                assert shown[choice["index"]]["text"] == choice["text"]
                assert shown[choice["index"]]["finish_reason"] == "length"
            assert usage["usage"]["completion_tokens"] == 12

    asyncio.run(main())


def test_a_search_is_not_sampled_as_the_model_recommends(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            server.engine.sampling_defaults = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
            assert len((await completion(server, BEAMS | {"n": 2}))["choices"]) == 2

    asyncio.run(main())


def test_a_chat_is_searched_like_its_prompt(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            fields = {"max_tokens": 6, "use_beam_search": True, "n": 2, "best_of": 3, "return_token_ids": True}
            body = {"messages": [{"role": "user", "content": "count"}]} | fields
            chat = (await server.post(CHAT, body)).json()
            text = await completion(server, {"prompt": chat["prompt_token_ids"]} | fields)
            expected = [choice["token_ids"] for choice in text["choices"]]
            assert [choice["token_ids"] for choice in chat["choices"]] == expected

    asyncio.run(main())


def test_a_client_that_leaves_ends_its_search(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, step_delay=0.005) as server:
            call = asyncio.create_task(server.post(COMPLETIONS, BEAMS | {"n": 3, "max_tokens": 1000}))
            await server.fake.wait_until(lambda: server.engine.stats().running == 3)
            call.cancel()
            await server.fake.wait_idle()

    asyncio.run(main())


def test_best_of_returns_n_answers_and_counts_them(tmp_path: Path) -> None:
    body = {"prompt": "x", "max_tokens": 4, "n": 2, "best_of": 5, "seed": 3, "return_token_ids": True}

    async def main() -> None:
        async with serve(tmp_path) as server:
            every = await completion(server, body | {"n": 5})
            best = await completion(server, body)
            assert [choice["index"] for choice in best["choices"]] == [0, 1]
            assert best["choices"][0]["logprobs"] is None
            candidates = [choice["token_ids"] for choice in every["choices"]]
            assert all(choice["token_ids"] in candidates for choice in best["choices"])
            assert best["usage"]["completion_tokens"] == 8
            chunks = await streamed(server, body | {"best_of": 2})
            assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}

    asyncio.run(main())


# -- prompts -------------------------------------------------------------------------------------------------------


def test_the_server_says_how_many_prompts_a_call_may_have(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=ServerConfig(port=0, max_prompts=2)) as server:
            assert (await server.post(COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 1})).status == 200
            error = (await server.post(COMPLETIONS, {"prompt": ["a", "b", "c"], "max_tokens": 1})).error()
            assert (error["param"], error["message"]) == ("prompt", "prompt has 3 prompts; allowed: at most 2")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("prompt", "kept", "expected"),
    [("a long prompt", 6, "prompt"), ([97, 98, 99], 2, "bc"), ("ab", 10, "ab"), ("x" * 200 + "yz", -1, None)],
)
def test_the_last_tokens_of_a_prompt_are_kept(tmp_path: Path, prompt: Any, kept: int, expected: str | None) -> None:
    body = {"prompt": prompt, "truncate_prompt_tokens": kept, "max_tokens": 4, "echo": True, "return_token_ids": True}
    choice = ask(tmp_path, body, max_position_embeddings=100)["choices"][0]
    if expected is None:
        expected = "x" * 94 + "yz"  # with 4 more, the context is full
    assert bytes(choice["prompt_token_ids"]).decode() == expected
    assert choice["text"].startswith(expected) and len(choice["text"]) == len(expected) + 4


def test_prompt_logprobs_and_echo_are_streamed_with_the_first_chunk(tmp_path: Path) -> None:
    body = {"prompt": "count", "max_tokens": 50, "prompt_logprobs": 1, "echo": True, "logprobs": 1}

    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            whole = (await completion(server, body))["choices"][0]
            reply = await server.post(COMPLETIONS, body | {"stream": True})
            choices = [event["choices"][0] for event in reply.events()[:-1]]
            assert choices[0]["prompt_logprobs"] == whole["prompt_logprobs"]
            assert not any("prompt_logprobs" in choice for choice in choices[1:])
            assert "".join(choice["text"] for choice in choices) == whole["text"]
            for name in ("tokens", "token_logprobs", "text_offset"):
                assert sum((choice["logprobs"][name] for choice in choices), []) == whole["logprobs"][name]

    asyncio.run(main())


def test_prompt_logprobs_alone_are_streamed(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            chunks = await streamed(server, {"prompt": "count", "max_tokens": 3, "prompt_logprobs": 0, "n": 2})
            shown = [choice for chunk in chunks for choice in chunk["choices"] if "prompt_logprobs" in choice]
            assert [choice["index"] for choice in shown] in ([0, 1], [1, 0])
            assert all(len(choice["prompt_logprobs"]) == 5 for choice in shown)

    asyncio.run(main())


# -- what reaches the worker ---------------------------------------------------------------------------------------


STRING: dict[str, Any] = {"type": "string"}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"guided_regex": "[a-z]+"}, guidance.from_regex("[a-z]+")),
        ({"structured_outputs": {"regex": "[a-z]+"}}, guidance.from_regex("[a-z]+")),
        ({"guided_choice": ["a", "b"]}, guidance.from_choice(["a", "b"])),
        ({"structured_outputs": {"choice": ["a", "b"]}}, guidance.from_choice(["a", "b"])),
        ({"guided_json": STRING}, guidance.from_json_schema(STRING)),
        ({"guided_json": json.dumps(STRING)}, guidance.from_json_schema(STRING)),
        ({"structured_outputs": {"json": STRING}}, guidance.from_json_schema(STRING)),
        ({"guided_grammar": 'start: "x"'}, guidance.from_lark('start: "x"')),
        ({"response_format": {"type": "json_object"}}, guidance.from_json_schema(guidance.ANY_JSON_OBJECT)),
        ({"structured_outputs": {"json_object": True}}, guidance.from_json_schema(guidance.ANY_JSON_OBJECT)),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": STRING}}},
         guidance.from_json_schema(STRING)),
    ],
)  # fmt: skip
def test_each_spelling_of_a_form_becomes_a_grammar(tmp_path: Path, fields: dict[str, Any], grammar: str) -> None:
    assert worker_params(tmp_path, {"prompt": "greet"} | fields).guidance == grammar


def test_free_text_has_no_grammar(tmp_path: Path) -> None:
    assert worker_params(tmp_path, {"prompt": "greet", "response_format": {"type": "text"}}).guidance is None


def test_token_lists_and_bad_words_reach_the_worker(tmp_path: Path) -> None:
    params = worker_params(tmp_path, {"prompt": "greet", "allowed_token_ids": [97, 98], "bad_words": ["no", "never"]})
    assert (tuple(params.allowed_token_ids or ()), tuple(params.bad_words)) == ((97, 98), ("no", "never"))


def test_what_changes_nothing_is_taken(tmp_path: Path) -> None:
    neutral = {
        "suffix": None, "spaces_between_special_tokens": False, "truncation_side": "left", "stream_interval": 1,
        "guided_decoding_backend": "auto", "logprob_token_ids": None, "kv_transfer_params": None, "vllm_xargs": {},
        "session_id": "s", "user": "u", "length_penalty": 1.0, "early_stopping": False, "best_of": 1, "bad_words": [],
    }  # fmt: skip
    assert ask(tmp_path, {"prompt": "greet", "max_tokens": 100} | neutral)["choices"][0]["text"] == REPLIES["greet"]


# -- refusals ------------------------------------------------------------------------------------------------------

SEARCH = {"use_beam_search": True, "n": 2}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"best_of": 0}, "best_of", "best_of is 0; allowed: 1 to 128"),
    ({"best_of": 10**6}, "best_of", "best_of is 1000000; allowed: 1 to 128"),
    ({"n": 3, "best_of": 2}, "best_of", "best_of is 2; allowed: 3 to 128"),
    ({"best_of": 2**70}, "best_of", "best_of is"),
    ({"best_of": True}, "best_of", "true or false"),
    ({"best_of": 2, "stream": True}, "best_of", "best_of is 2; allowed with stream: true: n (1)"),
    ({"prompt": ["a"] * 200, "best_of": 100}, "best_of", "1024"),
    ({"use_beam_search": 1}, "use_beam_search", "an integer; allowed: true or false"),
    ({"length_penalty": 2.0}, "length_penalty", "length_penalty is 2.0; allowed: 1.0, unless use_beam_search"),
    ({"early_stopping": True}, "early_stopping", "allowed: False, unless use_beam_search"),
    (SEARCH | {"length_penalty": float("nan")}, "length_penalty", "length_penalty is NaN; allowed: a finite number"),
    (SEARCH | {"length_penalty": 1e300}, "length_penalty", "length_penalty is 1e+300; allowed: -10 to 10"),
    (SEARCH | {"length_penalty": float("-inf")}, "length_penalty", "length_penalty is -Infinity"),
    (SEARCH | {"early_stopping": "always"}, "early_stopping", "early_stopping"),
    (SEARCH | {"best_of": 100}, "best_of", "best_of is 100; allowed with use_beam_search: at most --max-num-seqs (64)"),
    (SEARCH | {"n": 100}, "n", "n is 100; allowed with use_beam_search: at most --max-num-seqs (64)"),
    (SEARCH | {"temperature": 0.7}, "temperature", "temperature is 0.7; allowed with use_beam_search: 0 or 1"),
    (SEARCH | {"top_k": 5}, "top_k", "top_k is 5; allowed with use_beam_search"),
    (SEARCH | {"stop": "x"}, "stop", "stop is set; allowed with use_beam_search: to leave it out"),
    (SEARCH | {"logit_bias": {"5": 1}}, "logit_bias", "allowed with use_beam_search"),
    (SEARCH | {"guided_regex": "a"}, "guided_regex", "allowed with use_beam_search"),
    (SEARCH | {"max_tokens": 0}, "max_tokens", "max_tokens is 0; allowed: at least 1 with use_beam_search"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "truncate_prompt_tokens is 0"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "truncate_prompt_tokens is -2"),
    ({"truncate_prompt_tokens": 2**63}, "truncate_prompt_tokens", "truncate_prompt_tokens is"),
    ({"truncation_side": "right"}, "truncation_side", 'truncation_side is "right"'),
    ({"allowed_token_ids": [1] * 10**6}, "allowed_token_ids", "1000000 entries"),
    ({"bad_words": ["x"] * 10**6}, "bad_words", "1000000 entries"),
    ({"guided_choice": ["x"] * 10**6}, "guided_choice", "1000000 entries"),
    ({"guided_choice": []}, "guided_choice", "at least one text"),
    ({"guided_json": "{"}, "guided_json", "guided_json"),
    ({"guided_json": "[]"}, "guided_json", "guided_json"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "one form of the answer"),
    ({"guided_regex": "(["}, "guided_regex", "guided_regex"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "strange"}}}},
     "response_format", "response_format"),
    ({"guided_regex": 5}, "guided_regex", "an integer"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not a field"),
    ({"response_format": {"type": "xml"}}, "response_format.type", '"xml"; allowed: text, json_object, json_schema'),
    ({"spaces_between_special_tokens": True}, "spaces_between_special_tokens", "does not honour it"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds", "does not honour it"),
    ({"logits_processors": ["x"]}, "logits_processors", "does not honour it"),
    ({"kv_transfer_params": {}}, "kv_transfer_params", "does not honour it"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs", "does not honour it"),
    ({"repetition_detection": {}}, "repetition_detection", "does not honour it"),
    ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "does not honour it"),
    ({"request_id": "mine"}, "request_id", "does not honour it"),
    ({"watermarking": True}, "watermarking", "does not honour it"),
]


def test_bad_fields_are_named_and_leave_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, max_position_embeddings=256) as server:
            for fields, param, message in BAD:
                reply = await server.post(COMPLETIONS, io.BytesIO(json.dumps({"prompt": "x"} | fields).encode()))
                assert reply.status == 400, (fields if len(str(fields)) < 500 else param, reply.body)
                error = reply.error()
                assert error["param"] == param, (param, error)
                assert message in error["message"] and len(error["message"]) < 1000, (message, error)
            assert not server.executor.plans, "nothing of it was computed"

    asyncio.run(main())
