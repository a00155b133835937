"""Texts that parsers, logs, headers and file names stumble over: 200 or a 4xx with a reason, and nothing else happens.

Faults: 12 (JSON and strings), 25 (log and header injection), 26 (names), 47 (addresses are never fetched).
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from servd.api.http.decode import decode_body
from servd.errors import InvalidRequestError
from servd.log import setup_logging
from tests.api.http.hostile_texts import INVALID_JSON, STRINGS, VALID_JSON
from tests.api.http.serving import CHAT, COMPLETIONS, Served, serve

ANY_OBJECT = msgspec.json.Decoder(dict[str, Any])


def wrapped(text: bytes) -> bytes:
    return b'{"value": ' + text + b"}"


def test_the_lists_are_long_enough() -> None:
    assert len(set(VALID_JSON)) + len(set(INVALID_JSON)) >= 150
    assert len(set(STRINGS)) >= 150


@pytest.mark.parametrize("text", VALID_JSON, ids=range(len(VALID_JSON)))
def test_what_is_json_is_read_as_it_is_meant(text: bytes) -> None:
    assert decode_body(wrapped(text), ANY_OBJECT) == {"value": json.loads(text)}


@pytest.mark.parametrize("text", INVALID_JSON, ids=range(len(INVALID_JSON)))
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode_body(wrapped(text), ANY_OBJECT)
    assert "0x7" not in caught.value.message and "site-packages" not in caught.value.message


def test_the_server_answers_all_of_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            for text in VALID_JSON + INVALID_JSON:
                for path, body in (
                    (COMPLETIONS, text),
                    (COMPLETIONS, b'{"prompt": ' + text + b', "max_tokens": 1}'),
                    (CHAT, b'{"messages": [{"role": "user", "content": ' + text + b'}], "max_tokens": 1}'),
                ):
                    reply = await server.post(path, body)
                    assert reply.status in ((200, 400) if text in VALID_JSON else (400,)), (path, text, reply.body)
                    if reply.status == 400:
                        assert "site-packages" not in reply.error()["message"]

    asyncio.run(main())


async def send_everywhere(server: Served, text: str) -> int:
    """Send a string in each place that takes one; the number of calls."""
    user = [{"role": "user", "content": text}]
    calls: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
        (COMPLETIONS, {"prompt": text, "user": text, "cache_salt": text, "max_tokens": 2}, (200, 400)),
        (COMPLETIONS, {"prompt": "x", "stop": [text], "max_tokens": 2, "echo": True}, (200, 400)),
        (COMPLETIONS, {"prompt": text, "stream": True, "max_tokens": 2, "echo": True}, (200, 400)),
        (COMPLETIONS, {"prompt": "x", "model": text}, (400, 404)),
        (CHAT, {"messages": user, "metadata": {text: text}, "max_tokens": 2}, (200, 400)),
        (CHAT, {"messages": [{"role": text, "content": "x"}]}, (200, 400)),
        (CHAT, {"messages": [{"role": "user", "name": text, "content": [{"type": text, "text": text}]}]}, (200, 400)),
        ("/tokenize", {"prompt": text, "return_token_strs": True}, (200, 400)),
    ]
    for path, fields, allowed in calls:
        if fields.get("model") in ("", "fake"):
            continue
        reply = await server.post(path, fields)
        assert reply.status in allowed, (path, text, reply.status, reply.body[:300])
        assert b"site-packages" not in reply.body and b"Traceback" not in reply.body
    reply = await server.request("GET", f"/v1/models/{quote(text, safe='')}")
    assert reply.status in (404, 414), (text, reply.body)
    return len(calls) + 1


def test_strings_do_no_harm_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[str] = []
    watching = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("open", "socket.connect", "os.system", "subprocess.Popen", "socket.getaddrinfo"):
            opened.append(f"{event} {arguments!r}")

    async def main() -> None:
        nonlocal watching
        async with serve(tmp_path) as server:
            num_calls = 0
            for text in STRINGS:
                num_calls += await send_everywhere(server, text)
            watching = False
            metrics = (await server.request("GET", "/metrics")).body.decode()
            assert "passwd" not in metrics and "nil" not in metrics and "script" not in metrics
            lines = capsys.readouterr().err.split("\n")[:-1]
            assert len(lines) >= num_calls, "one line a call"
            assert all(line.isprintable() and line[:2].isdigit() and "servd." in line for line in lines), "forged"
            assert len(lines) <= num_calls * 2

    setup_logging("info")
    sys.addaudithook(audit)
    try:
        asyncio.run(main())
    finally:
        watching = False
    wanted = [event for event in opened if any(part in event for part in ("passwd", "/dev/null", "127.0.0.1:1/"))]
    assert not wanted, wanted
    assert not [event for event in opened if event.startswith(("os.system", "subprocess"))]


def test_request_ids_split_no_reply(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            for value in (
                b"a\rX-Evil: 1", b"a\nX-Evil: 1", b"a\r\n X-Evil: 1", b"a\x00b", b"%0d%0aX-Evil:1", b"a\x0bX-Evil: 1",
                b"\xe5\x98\x8a\xe5\x98\x8dX-Evil: 1", b"a\x85X-Evil: 1",
            ):  # fmt: skip
                head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-Id: "
                answer = await server.raw(head + value + b"\r\n\r\n")
                headers, _, _ = answer.partition(b"\r\n\r\n")
                assert headers.split(b" ")[1] in (b"200", b"400"), (value, answer)
                assert b"X-Evil" not in headers and b"\n" not in headers.replace(b"\r\n", b""), (value, headers)

    asyncio.run(main())


def test_addresses_in_a_body_are_never_fetched(tmp_path: Path) -> None:
    visitors = []

    async def main() -> None:
        def visited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            visitors.append(writer.get_extra_info("peername"))
            writer.close()

        canary = await asyncio.start_server(visited, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{canary.sockets[0].getsockname()[1]}/x"
        schema = {"$ref": address, "$schema": address, "$id": address, "type": "object"}
        tool = {"type": "function", "function": {"name": "f", "description": address, "parameters": schema}}
        async with serve(tmp_path) as server:
            def parts(part: dict[str, Any]) -> dict[str, Any]:
                return {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}

            user = [{"role": "user", "content": address}]
            calls: list[tuple[str, dict[str, Any]]] = [
                (CHAT, parts({"type": "image_url", "image_url": {"url": address}})),
                (CHAT, parts({"type": "input_audio", "input_audio": {"data": address, "format": "wav"}})),
                (CHAT, parts({"type": "file", "file": {"file_id": address, "file_data": address}})),
                (CHAT, parts({"type": "video_url", "video_url": {"url": address}})),
                (CHAT, {"messages": user, "max_tokens": 1, "tools": [tool], "tool_choice": "required"}),
                (CHAT, {"messages": user, "max_tokens": 1, "response_format": {
                    "type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}}),
                (CHAT, {"messages": user, "max_tokens": 1, "chat_template": address}),
                (COMPLETIONS, {"prompt": address, "max_tokens": 1, "guided_json": schema}),
                (COMPLETIONS, {"prompt": address, "max_tokens": 1, "model": address}),
                ("/v1/responses", {"input": [{"role": "user", "content": [
                    {"type": "input_image", "image_url": address}]}]}),
                ("/v1/responses", {"input": "x", "tools": [
                    {"type": "mcp", "server_url": address, "server_label": "x"}]}),
                ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": [
                    {"type": "image", "source": {"type": "url", "url": address}}]}]}),
                ("/v1/embeddings", {"input": address}),
                ("/v2/repository/index", {"url": address}),
            ]  # fmt: skip
            for path, body in calls:
                for stream in (False, True):
                    reply = await server.post(path, body | ({"stream": True} if stream else {}))
                    assert reply.status < 500, (path, body, reply.body)
            await asyncio.sleep(0.1)
        canary.close()

    asyncio.run(main())
    assert not visitors


def test_names_open_no_file_and_make_no_metric(tmp_path: Path) -> None:
    names = (
        "../../etc/passwd", "/etc/passwd", "a\0b", "a:b:c", "fake/../fake", "fake:lora", "./fake", "FAKE", "fake ",
        "\u2603", "fake\n", "file:///etc/passwd", "x" * 3000, str(Path(__file__)),
    )  # fmt: skip
    calls: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": "x"}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [65]}),
    ]

    async def main() -> None:
        async with serve(tmp_path) as server:
            for name in names:
                for path, body in calls:
                    reply = await server.post(path, body | {"model": name})
                    assert (reply.status, reply.error()["param"]) == (404, "model"), (path, name, reply.body)
            metrics = (await server.request("GET", "/metrics")).body
            assert b"passwd" not in metrics and b"lora" not in metrics

    asyncio.run(main())
