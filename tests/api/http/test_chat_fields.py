"""Fields of /v1/chat/completions beyond sampling: the form of the answer, and how the prompt is made."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from openai.types.chat import ChatCompletion

from tests.api.http.serving import CHAT, Served, serve

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "title": "Count"}


async def post(server: Served, **fields: Any) -> dict[str, Any]:
    reply = await server.post(
        CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0} | fields
    )
    assert reply.status == 200, reply.body
    ChatCompletion.model_validate(reply.json(), strict=True)
    return reply.json()


def last(server: Served) -> Any:
    return [new for plan in server.executor.plans for new in plan.new_requests][-1]


def prompt_of(server: Served) -> str:
    return bytes(last(server).token_ids).decode()


def test_answer_formats_become_grammars(tmp_path: Path) -> None:
    formats: list[tuple[dict[str, Any], Any]] = [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": SCHEMA}}},
         SCHEMA),
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"guided_json": SCHEMA}, SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, SCHEMA),
        ({"structured_outputs": {"json_object": True}}, {"type": "object"}),
        ({"guided_regex": "[ab]+"}, "[ab]+"),
        ({"structured_outputs": {"regex": "[ab]+"}}, "[ab]+"),
        ({"guided_choice": ["yes", "no"]}, '"no"'),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, '"no"'),
        ({"guided_grammar": 'start: "x"'}, 'start: "x"'),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, 'start: "x"'),
    ]  # fmt: skip

    async def main() -> None:
        async with serve(tmp_path) as server:
            await post(server, response_format={"type": "text"})
            assert last(server).sampling_params.guidance is None
            for fields, expected in formats:
                await post(server, **fields)
                [grammar] = json.loads(last(server).sampling_params.guidance)["grammars"]
                if isinstance(expected, dict):
                    assert expected.items() <= grammar["json_schema"].items(), fields
                else:
                    assert expected in grammar["lark_grammar"], fields

    asyncio.run(main())


def test_bad_formats_are_named(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str, str]] = [
        ({"response_format": {"type": "xml"}}, "response_format.type", '"xml"; allowed: text, json_object'),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "without json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"name": "c"}}}, "response_format.json_schema",
         "only there"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "beside response_format"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs.regex", "one form"),
        ({"guided_json": "[1]"}, "guided_json", "JSON object"),
        ({"guided_json": {"enum": [0] * 60_000}}, "guided_json", "more than 50000 values"),
        ({"guided_choice": []}, "guided_choice", "at least one"),
        ({"guided_choice": ["x"] * 5000}, "guided_choice", "5000 entries"),
        ({"chat_template_kwargs": {"x": json.loads("[" * 80 + "]" * 80)}}, "chat_template_kwargs", "levels deep"),
        ({"chat_template_kwargs": {"x": [0] * 20_000}}, "chat_template_kwargs", "more than 10000 values"),
        ({"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs", "the server sets itself"),
        ({"documents": [{"text": "x"}]}, "documents", "takes none"),
        ({"documents": [{}] * 2000}, "documents", "2000 entries"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "cannot be told"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "allowed: none, minimal"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "allowed: 1 to"),
        ({"allowed_token_ids": [999]}, "allowed_token_ids", "999"),
        ({"bad_words": [""]}, "bad_words", "1 to 128 characters"),
        ({"guided_regex": "(a"}, "guided_regex", "guided_regex"),
        ({"guided_json": {"type": "object", "not": {}}}, "guided_json", "'not' at # is not supported"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "one of the two"),
    ]  # fmt: skip

    async def main() -> None:
        async with serve(tmp_path) as server:
            problems = []
            for fields, param, text in bad:
                reply = await server.post(
                    CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1} | fields
                )
                error = reply.json().get("error") or {"param": None, "message": reply.body.decode()}
                if (reply.status, error["param"]) != (400, param) or text not in error["message"]:
                    problems.append(f"{json.dumps(fields)[:80]}: {reply.status} {error}")
            assert not problems, "\n".join(problems)

    asyncio.run(main())


def test_the_final_message_goes_on(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So, "}]

    async def main() -> None:
        async with serve(tmp_path) as server:
            reply = await post(server, messages=messages, continue_final_message=True, add_generation_prompt=False)
            assert prompt_of(server) == "user: hi\nassistant: So, "
            echoed = await post(server, messages=messages, continue_final_message=True, echo=True)
            content = reply["choices"][0]["message"]["content"]
            assert echoed["choices"][0]["message"]["content"] == f"So, {content}"
            fields = {
                "messages": messages,
                "continue_final_message": True,
                "echo": True,
                "stream": True,
                "max_tokens": 3,
                "temperature": 0,
            }
            events = (await server.post(CHAT, fields)).events()
            deltas = [event["choices"][0]["delta"] for event in events[:-1]]
            assert deltas[:2] == [{"role": "assistant", "content": ""}, {"content": "So, "}]
            assert "".join(delta.get("content", "") for delta in deltas) == f"So, {content}"

    asyncio.run(main())


def test_the_prompt_can_be_truncated(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            reply = await post(server, truncate_prompt_tokens=4)
            assert (prompt_of(server), reply["usage"]["prompt_tokens"]) == ("nt: ", 4)
            await post(server, truncate_prompt_tokens=4000)
            assert prompt_of(server) == "user: hi\nassistant: "
        async with serve(tmp_path, max_position_embeddings=10) as server:
            reply = await post(server, truncate_prompt_tokens=-1)
            assert (prompt_of(server), reply["usage"]["total_tokens"]) == ("stant: ", 10)

    asyncio.run(main())


def test_template_variables_of_any_kind_reach_the_template(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            await post(server, chat_template_kwargs={"x": {"y": [1, None, "z"]}, "on": True})
            assert prompt_of(server).startswith('[{"on": true, "x": {"y": [1, null, "z"]}}]')
            await post(server, reasoning_effort="none")
            assert prompt_of(server) == "user: hi\nassistant: "

    asyncio.run(main())


def test_sampling_limits_reach_the_engine(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            await post(server, allowed_token_ids=[65, 66], bad_words=["no"])
            params = last(server).sampling_params
            assert (list(params.allowed_token_ids), list(params.bad_words)) == ([65, 66], ["no"])

    asyncio.run(main())


def test_reasoning_of_earlier_answers_is_taken_under_both_names(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            for name in ("reasoning", "reasoning_content"):
                answer = {"role": "assistant", "content": "a", name: "because"}
                await post(
                    server, messages=[{"role": "user", "content": "hi"}, answer, {"role": "user", "content": "?"}]
                )
                assert prompt_of(server) == "user: hi\nassistant: a\nuser: ?\nassistant: "

    asyncio.run(main())


def test_streams_show_the_prompts_log_probabilities_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            whole = await post(server, prompt_logprobs=1)
            body = {
                "messages": [{"role": "user", "content": "hi"}],
                "max_tokens": 3,
                "prompt_logprobs": 1,
                "stream": True,
            }
            choices = [event["choices"][0] for event in (await server.post(CHAT, body)).events()[:-1]]
            shown = [choice["prompt_logprobs"] for choice in choices if "prompt_logprobs" in choice]
            assert shown == [whole["prompt_logprobs"]] and len(shown[0]) == whole["usage"]["prompt_tokens"]

    asyncio.run(main())
