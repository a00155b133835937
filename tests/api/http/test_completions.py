"""/v1/completions: each documented field does what it says, and replies are what OpenAI's types demand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion

from tests.api.http.serving import COMPLETIONS, Served, serve
from tests.fakes import EOS, ByteTokenizer

REPLIES = {"greet": "Hello, 世界 😀!", "count": "one two three", "empty": ""}


def ask(folder: Path, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The reply to one completion request, validated strictly, from a server of its own."""

    async def main() -> dict[str, Any]:
        async with serve(folder, replies=REPLIES, **options) as server:
            return await completion(server, body)

    return asyncio.run(main())


async def completion(server: Served, body: dict[str, Any]) -> dict[str, Any]:
    reply = await server.post(COMPLETIONS, body)
    assert reply.status == 200, reply.body
    value = reply.json()
    Completion.model_validate(without_nulls(value), strict=True)
    assert (value["object"], value["model"]) == ("text_completion", "fake")
    assert value["id"].startswith("cmpl-") and value["system_fingerprint"].startswith("fp_")
    return value


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """The SDK's types have no place for the null that OpenAI itself sends for the first echoed token."""
    value = value | {"choices": [dict(choice) for choice in value["choices"]]}
    for choice in value["choices"]:
        if choice["logprobs"] and choice["logprobs"]["token_logprobs"][:1] == [None]:
            choice["logprobs"] = {name: entries[1:] for name, entries in choice["logprobs"].items()}
    return value


def test_text_prompt(tmp_path: Path) -> None:
    reply = ask(tmp_path, {"model": "fake", "prompt": "greet", "max_tokens": 100})
    choice = reply["choices"][0]
    assert choice["text"] == REPLIES["greet"]
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "stop", None)
    num_tokens = len(REPLIES["greet"].encode()) + 1  # and end-of-text
    assert reply["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": num_tokens,
        "total_tokens": 5 + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_token_ids_mean_the_same_as_their_text(tmp_path: Path) -> None:
    async def main() -> tuple[dict[str, Any], dict[str, Any]]:
        async with serve(tmp_path) as server:
            text = await completion(server, {"prompt": "abc", "temperature": 0})
            ids = await completion(server, {"prompt": [97, 98, 99], "temperature": 0})
            return text, ids

    text, ids = asyncio.run(main())
    assert text["choices"] == ids["choices"]
    assert len(text["choices"][0]["text"]) == 16, "OpenAI's default of max_tokens"
    assert text["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", [["greet", "count"], [list(b"greet"), list(b"count")]])
def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(tmp_path: Path, prompt: list[Any]) -> None:
    reply = ask(tmp_path, {"prompt": prompt, "n": 3, "max_tokens": 50})
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    assert [choice["text"] for choice in reply["choices"]] == [REPLIES["greet"]] * 3 + [REPLIES["count"]] * 3
    assert reply["usage"]["prompt_tokens"] == 10, "a prompt counts once, whatever n"


def test_seed_repeats_and_n_differs(tmp_path: Path) -> None:
    async def main() -> list[list[str]]:
        async with serve(tmp_path) as server:
            body = {"prompt": "x", "n": 4, "seed": 7, "max_tokens": 8}
            replies = [await completion(server, body), await completion(server, body | {"seed": 8})]
            replies.append(await completion(server, body))
            return [[choice["text"] for choice in reply["choices"]] for reply in replies]

    first, other, again = asyncio.run(main())
    assert first == again != other
    assert len(set(first)) > 1


def test_stop_strings_and_tokens(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            base = {"prompt": "count", "max_tokens": 50}

            async def choice(**fields: Any) -> tuple[str, str, Any]:
                found = (await completion(server, base | fields))["choices"][0]
                return found["text"], found["finish_reason"], found["stop_reason"]

            assert await choice(stop="two") == ("one ", "stop", "two")
            assert await choice(stop=["zzz", " t"]) == ("one", "stop", " t")
            assert await choice(stop="two", include_stop_str_in_output=True) == ("one two", "stop", "two")
            assert await choice(stop_token_ids=[ord("w")]) == ("one t", "stop", ord("w"))
            assert await choice(ignore_eos=True, max_tokens=16) == ("one two three", "length", None)
            assert await choice(ignore_eos=True, max_tokens=16, skip_special_tokens=False) == (
                "one two three<eos><eos><eos>", "length", None,
            )  # fmt: skip
            assert await choice(min_tokens=15) == ("one two three..", "stop", None)
            assert await choice(logit_bias={"33": 100}, max_tokens=3) == ("!!!", "length", None)

    asyncio.run(main())


def test_echo_and_max_tokens_0(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            echoed = await completion(server, {"prompt": "greet", "echo": True, "max_tokens": 6})
            assert echoed["choices"][0]["text"] == "greetHello,"
            ids = await completion(server, {"prompt": list(b"greet"), "echo": True, "max_tokens": 0})
            assert ids["choices"][0]["text"] == "greet"
            assert (ids["choices"][0]["finish_reason"], ids["usage"]["completion_tokens"]) == ("length", 0)
            nothing = await completion(server, {"prompt": "greet", "max_tokens": 0})
            assert nothing["choices"][0]["text"] == ""

    asyncio.run(main())


def test_logprobs_in_the_legacy_shape(tmp_path: Path) -> None:
    reply = ask(tmp_path, {"prompt": "count", "logprobs": 2, "max_tokens": 3})
    assert reply["choices"][0]["logprobs"] == {
        "tokens": ["o", "n", "e"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"o": -0.5, "p": -1.5}, {"n": -0.5, "o": -1.5}, {"e": -0.5, "f": -1.5}],
        "text_offset": [0, 1, 2],
    }


def test_text_offsets_count_characters_of_the_text_not_of_the_tokens(tmp_path: Path) -> None:
    body = {"prompt": [256, *"é".encode(), 33], "echo": True, "logprobs": 0, "max_tokens": 1, "logit_bias": {"63": 100}}
    choice = ask(tmp_path, body)["choices"][0]
    assert choice["text"] == "é!?", "special tokens are left out of the text, but have a place among the tokens"
    assert choice["logprobs"]["tokens"] == ["<eos>", "\ufffd", "\ufffd", "!", "?"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 0, 1, 2]


def test_text_offsets_count_special_tokens_that_the_prompt_writes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(tokenizer: ByteTokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        parts = [list(part.encode()) for part in text.split("<eos>")]
        return parts[0] + [token_id for part in parts[1:] for token_id in [EOS, *part]]

    body = {"prompt": "a<eos>é", "echo": True, "logprobs": 0, "max_tokens": 1, "logit_bias": {"63": 100}}
    monkeypatch.setattr(ByteTokenizer, "encode", encode)
    choice = ask(tmp_path, body)["choices"][0]
    assert choice["text"] == "a<eos>é?"
    assert choice["logprobs"]["tokens"] == ["a", "<eos>", "\ufffd", "\ufffd", "?"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 6, 6, 7]


def test_text_offsets_leave_out_what_the_tokenizer_puts_before_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text, _=True: [EOS, *encode(self, text)])
    body = {"prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 1, "logit_bias": {"63": 100}}
    choice = ask(tmp_path, body)["choices"][0]
    assert choice["text"] == "ab?"
    assert choice["logprobs"]["tokens"] == ["<eos>", "a", "b", "?"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]


def test_echoed_logprobs_begin_with_the_prompt(tmp_path: Path) -> None:
    reply = ask(tmp_path, {"prompt": "greet", "logprobs": 1, "max_tokens": 2, "echo": True, "n": 2})
    for choice in reply["choices"]:
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == list("greetHe")
        assert logprobs["token_logprobs"] == [None] + [-0.5] * 6
        assert logprobs["top_logprobs"][:2] == [None, {"r": -0.5}]
        assert logprobs["text_offset"] == list(range(7))


def test_token_ids_and_prompt_logprobs_of_vllm(tmp_path: Path) -> None:
    reply = ask(
        tmp_path, {"prompt": "count", "max_tokens": 50, "stop": "e", "return_token_ids": True, "prompt_logprobs": 1}
    )
    choice = reply["choices"][0]
    assert choice["prompt_token_ids"] == list(b"count")
    assert choice["token_ids"] == list(b"one")
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1] == {"111": {"logprob": -0.5, "rank": 1, "decoded_token": "o"}}


def test_cached_prompt_tokens_are_reported(tmp_path: Path) -> None:
    async def main() -> list[int]:
        async with serve(tmp_path, settings={"block_size": 4}) as server:
            body = {"prompt": "0123456789", "max_tokens": 1}
            salted = body | {"cache_salt": "tenant"}
            replies = [await completion(server, b) for b in (body, body, salted, salted)]
            return [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]

    assert asyncio.run(main()) == [0, 8, 0, 8]


def streamed(events: list[Any]) -> dict[int, dict[str, Any]]:
    """What a client puts together from the chunks: {index: {text, finish_reason, tokens}}."""
    assert events[-1] == "[DONE]"
    answers: dict[int, dict[str, Any]] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            answer = answers.setdefault(choice["index"], {"text": "", "finish_reason": None, "tokens": []})
            assert answer["finish_reason"] is None, "nothing follows an answer's end"
            answer["text"] += choice["text"]
            answer["tokens"] += choice["logprobs"]["tokens"] if choice["logprobs"] else []
            answer["finish_reason"] = choice["finish_reason"]
    return answers


def test_a_stream_says_what_the_whole_reply_says(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            body = {"prompt": ["greet", "count", "other"], "n": 2, "seed": 3, "logprobs": 1, "echo": True}
            whole = await completion(server, body)
            reply = await server.post(COMPLETIONS, body | {"stream": True, "stream_options": {"include_usage": True}})
            events = reply.events()
            assert streamed(events) == {
                choice["index"]: {
                    "text": choice["text"],
                    "finish_reason": choice["finish_reason"],
                    "tokens": choice["logprobs"]["tokens"],
                }
                for choice in whole["choices"]
            }
            assert all(event["usage"] is None for event in events[:-2])
            assert events[-2]["choices"] == []
            for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
                assert events[-2]["usage"][field] == whole["usage"][field]
            assert len({event["id"] for event in events[:-1]}) == 1

    asyncio.run(main())


def test_stream_of_an_empty_answer_and_of_no_tokens(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, replies=REPLIES) as server:
            for fields, reason in (({"prompt": "empty"}, "stop"), ({"prompt": "greet", "max_tokens": 0}, "length")):
                events = (await server.post(COMPLETIONS, {"stream": True} | fields)).events()
                assert streamed(events) == {0: {"text": "", "finish_reason": reason, "tokens": []}}

    asyncio.run(main())


def test_usage_in_every_chunk_if_asked_for(tmp_path: Path) -> None:
    async def main() -> list[Any]:
        async with serve(tmp_path, step_delay=0.002) as server:
            options = {"include_usage": True, "continuous_usage_stats": True}
            body = {"prompt": "x", "max_tokens": 5, "stream": True, "stream_options": options}
            return (await server.post(COMPLETIONS, body)).events()

    events = asyncio.run(main())
    counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
    assert counts == sorted(counts) and counts[-1] == 5 and counts[0] >= 1


def test_a_stream_never_holds_half_a_character_nor_part_of_a_stop_string(tmp_path: Path) -> None:
    async def main() -> list[str]:
        async with serve(tmp_path, replies={"go": "日本語 STOP tail"}, step_delay=0.001) as server:
            body = {"prompt": "go", "max_tokens": 50, "stream": True, "stop": "STOP"}
            events = (await server.post(COMPLETIONS, body)).events()
            return [event["choices"][0]["text"] for event in events[:-1]]

    texts = asyncio.run(main())
    assert "".join(texts) == "日本語 "
    assert len(texts) > 2, "it came in pieces"
    assert not any("\ufffd" in text or "S" in text for text in texts)


def test_a_priority_is_taken_where_the_policy_heeds_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, settings={"scheduling_policy": "priority"}) as server:
            assert (await completion(server, {"prompt": "x", "priority": -3}))["usage"]["completion_tokens"] == 16

    asyncio.run(main())


def test_what_a_request_leaves_open_is_sampled_as_the_model_recommends(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.0, "max_length": 3, "eos_token_id": 1}')

    async def main() -> list[str]:
        async with serve(tmp_path) as server:
            bodies: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}, {"seed": 1, "temperature": 1.0}]
            replies = [await completion(server, {"prompt": "abc", "max_tokens": 9, **body}) for body in bodies]
            return [reply["choices"][0]["text"] for reply in replies]

    greedy, also_greedy, random = asyncio.run(main())
    assert greedy == also_greedy != random
