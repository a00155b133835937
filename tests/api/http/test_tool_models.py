"""Tools on /v1/chat/completions with models of other kinds: special tokens, templates without system messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from servd.engine.chat_template import ChatTemplate
from servd.errors import InvalidRequestError
from tests.api.http.serving import CHAT, COMPLETIONS, serve
from tests.api.http.test_tools import chunks, guidance_of, joined, prompt_of, whole
from tests.fakes import EOS, ByteTokenizer


class NoSystemTokenizer(ByteTokenizer):
    """Bytes, and a template that has no place for a system message."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        if messages[0]["role"] == "system":
            raise InvalidRequestError("no system messages", param="messages")
        return super().apply_chat_template(messages, **options)


def test_tools_reach_a_model_without_system_messages(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, tokenizer=NoSystemTokenizer()) as server:
            await whole(server, "hi", max_tokens=1)
            assert prompt_of(server).startswith("user: You may call functions")
            assert prompt_of(server).endswith("</tool_call>\n\nhi\nassistant: ")

    asyncio.run(main())


class MistralTokenizer(ByteTokenizer):
    """Bytes, and some control characters in the place of Mistral's special tokens."""

    SPECIAL: ClassVar[dict[int, str]] = {1: "[TOOL_CALLS]", 2: "[ARGS]", 3: "[THINK]", 4: "[/THINK]", 5: "[INST]"}
    special_token_ids = frozenset((EOS, *SPECIAL))
    template_variables = frozenset(("messages", "tools"))
    template_source = "{{ tools }}[TOOL_CALLS] {{ message.tool_calls }}[ARGS] [THINK]"

    def token_bytes(self, token_id: int) -> bytes:
        return self.SPECIAL[token_id].encode() if token_id in self.SPECIAL else super().token_bytes(token_id)

    def token_id(self, text: str) -> int | None:
        return {token: i for i, token in self.SPECIAL.items()}.get(text)


def test_special_tokens_are_read_and_never_shown(tmp_path: Path) -> None:
    replies = {
        "q-call": '\3Hm.\4\5Look:\1get_weather\2{"city": "P"}\1now\2{}',
        "q-text": "\5An [INST] \1answer \2.",
        "q-plain": "\1\2plain\3",
    }

    async def main() -> None:
        async with serve(tmp_path, replies=replies, tokenizer=MistralTokenizer()) as server:
            for make in (lambda what: whole(server, what), lambda what: chunks(server, what)):
                made = await make("q-call")
                message = made["message"] if isinstance(made, dict) else joined(made)
                assert (message["content"], message["reasoning"]) == ("Look:", "Hm.")
                assert [(call["function"]["arguments"], len(call["id"])) for call in message["tool_calls"]] == [
                    ('{"city": "P"}', 9), ("{}", 9)
                ]  # fmt: skip
            assert (await whole(server, "q-text"))["message"]["content"] == "An [INST] answer ."
            assert (await whole(server, "q-plain", tools=None))["message"]["content"] == "plain"
            shown = (await whole(server, "q-text", skip_special_tokens=False))["message"]["content"]
            assert shown == "[INST]An [INST] [TOOL_CALLS]answer [ARGS]."
            forced = await whole(server, "q-call", tool_choice="required")
            assert (
                forced["finish_reason"] == "tool_calls"
                and "<[1]>" in guidance_of(server)["grammars"][0]["lark_grammar"]
            )

    asyncio.run(main())


class SlowTemplateTokenizer(ByteTokenizer):
    """Bytes, and a template that loops until it is stopped."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
        return ChatTemplate(loops, {}).render(messages)


def test_a_template_without_end_is_stopped_and_hangs_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, tokenizer=SlowTemplateTokenizer(), step_delay=0.001) as server:
            chat = asyncio.create_task(server.post(CHAT, {"messages": [{"role": "user", "content": "hi"}]}))
            num_done = 0
            while not chat.done():
                reply = await server.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 5})
                assert reply.status == 200
                num_done += 1
            reply = await chat
            assert (reply.status, reply.error()["param"]) == (400, "messages")
            assert "takes longer than" in reply.error()["message"]
            assert num_done > 10, "completions went on meanwhile"

    asyncio.run(main())
