"""Bodies that ask for ten thousand of something: refused by the field's name before any of it is begun.

Faults: 17.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from servd.config import ServerConfig
from tests.api.http.serving import CHAT, COMPLETIONS, serve

MANY = 10_500  # bodies of less than a megabyte
SAID = [{"role": "user", "content": "x"}]
FUNCTION = {"type": "function", "function": {"name": "a"}}
CALL = {"id": "a", "type": "function", "function": {"name": "a", "arguments": "{}"}}
TENSOR = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["x"]}
MESSAGES = {"model": "fake", "max_tokens": 3, "messages": SAID}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": (COMPLETIONS, {"prompt": ["x"] * MANY}),
    "prompt of ids": (COMPLETIONS, {"prompt": [[1]] * MANY}),
    "n": (COMPLETIONS, {"prompt": "x", "n": MANY}),
    "best_of": (COMPLETIONS, {"prompt": "x", "best_of": MANY}),
    "stop": (COMPLETIONS, {"prompt": "x", "stop": ["s"] * MANY}),
    "stop_token_ids": (COMPLETIONS, {"prompt": "x", "stop_token_ids": [1] * MANY}),
    "logit_bias": (COMPLETIONS, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(MANY)}}),
    "bad_words": (COMPLETIONS, {"prompt": "x", "bad_words": ["x"] * MANY}),
    "guided_choice": (COMPLETIONS, {"prompt": "x", "guided_choice": ["a"] * MANY}),
    "messages": (CHAT, {"messages": SAID * MANY}),
    "content parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * MANY}]}),
    "tool_calls": (CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL] * MANY}]}),
    "tools": (CHAT, {"messages": SAID, "tools": [FUNCTION] * MANY}),
    "chat_template_kwargs": (CHAT, {"messages": SAID, "chat_template_kwargs": {str(i): 1 for i in range(MANY)}}),
    "input items": ("/v1/responses", {"input": SAID * MANY}),
    "tools of a response": ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": "a"}] * MANY}),
    "messages of Anthropic": ("/v1/messages", MESSAGES | {"messages": SAID * MANY}),
    "stop_sequences": ("/v1/messages", MESSAGES | {"stop_sequences": ["s"] * MANY}),
    "input": ("/v1/embeddings", {"input": ["x"] * MANY}),
    "inputs": ("/v2/models/fake/infer", {"inputs": [TENSOR] * MANY}),
}


@pytest.mark.parametrize("name", BODIES)
def test_ten_thousand_are_refused_before_any_is_begun(name: str, tmp_path: Path) -> None:
    async def main() -> None:
        path, body = BODIES[name]
        async with serve(tmp_path, server=ServerConfig(port=0, max_body_bytes=64 << 20)) as server:
            reply = await server.post(path, body)
            assert reply.status == 400, reply.body[:300]
            message = reply.body.decode()
            assert "allowed" in message or "more than" in message
            assert any(part in message for part in (name.split()[0], "content parts", "stop_sequences")), message
            assert server.engine.request_log.overview() == []

    asyncio.run(main())
