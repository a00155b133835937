"""Bodies and heads that are too large, too slow or not HTTP: refused early, in JSON, with the connection in order."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import socket
from pathlib import Path

import pytest
from aiohttp import web

from servd.api.http.decode import check_depth
from servd.api.service import MAX_DETOKENIZE_TOKENS, MAX_TOKENIZE_CHARS
from servd.config import ServerConfig
from servd.errors import InvalidRequestError
from tests.api.http.serving import CHAT, COMPLETIONS, serve
from tests.fakes import ByteTokenizer

SMALL = ServerConfig(port=0, max_body_bytes=100_000)
HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n".encode()


def test_a_body_over_the_limit_is_413(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:  # the default limit
            twenty_mb = b'{"prompt": "' + b"x" * 20_000_000 + b'"}'
            reply = await server.post(COMPLETIONS, io.BytesIO(twenty_mb))
            assert (reply.status, reply.error()["code"]) == (413, "payload_too_large")
            assert "8388608 bytes" in reply.error()["message"]

    asyncio.run(main())


def test_413_for_chunked_bodies(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=SMALL) as server:
            async def chunks() -> object:
                for _ in range(200):
                    yield b"x" * 1000

            chunked = await server.request("POST", COMPLETIONS, data=chunks())
            assert (chunked.status, chunked.error()["code"]) == (413, "payload_too_large")

    asyncio.run(main())


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x-unknown", "gzip, gzip"])
def test_compressed_bodies_are_refused_by_name_and_never_unpacked(tmp_path: Path, encoding: str) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            headers = {"Content-Encoding": encoding}
            for body in (gzip.compress(b'{"prompt": "x"}'), b'{"prompt": "x"}', b"not gzip"):
                reply = await server.post(COMPLETIONS, body, headers=headers)
                assert (reply.status, reply.error()["code"]) == (415, "unsupported_encoding")
                assert encoding in reply.error()["message"]
            plain = await server.post(COMPLETIONS, {"prompt": "x"}, headers={"Content-Encoding": "identity"})
            assert plain.status == 200

    asyncio.run(main())


def test_an_expectation_is_met_or_refused_in_json(tmp_path: Path) -> None:
    body = b'{"prompt": "x"}'

    async def main() -> None:
        async with serve(tmp_path) as server:
            rest = b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            met = await server.raw(HEAD + b"Expect: 100-continue\r\n" + rest)
            assert met.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
            for head in (HEAD, HEAD.replace(COMPLETIONS.encode(), b"/nowhere")):
                refused, _, error = (await server.raw(head + b"Expect: miracles\r\n" + rest)).partition(b"\r\n\r\n")
                assert refused.startswith(b"HTTP/1.1 400") and b"application/json" in refused
                assert "Expect" in json.loads(error)["error"]["message"]

    asyncio.run(main())


def test_texts_that_fit_no_context_are_refused_without_tokenizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    encode = ByteTokenizer.encode

    def spying(tokenizer: ByteTokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        texts.append(text)
        return encode(tokenizer, text, add_special_tokens)

    async def main() -> None:
        async with serve(tmp_path, max_position_embeddings=128) as server:
            monkeypatch.setattr(ByteTokenizer, "encode", spying)
            long = "x" * (128 * len("<eos>") + 1)  # its longest token, 128 times, and one more
            user = {"role": "user", "content": long}
            for path, fields, param in (
                (COMPLETIONS, {"prompt": long}, "prompt"),
                (COMPLETIONS, {"prompt": ["x", long]}, "prompt[1]"),
                (CHAT, {"messages": [user]}, "messages"),
                (CHAT, {"messages": [user | {"content": long[:400]}] * 2}, "messages"),
            ):
                reply = await server.post(path, fields)
                assert (reply.status, reply.error()["param"]) == (400, param)
                assert "allowed: at most 127 tokens" in reply.error()["message"]
            assert texts == ["x"], "nothing long was tokenized"
            just_fits = await server.post(COMPLETIONS, {"prompt": long[:-1]})
            assert "640 tokens" in just_fits.error()["message"], "what might fit is counted exactly"
            counted = await server.post("/tokenize", {"prompt": long})
            assert counted.json()["count"] == len(long), "texts may be counted that fit no context"
            data = json.dumps({"prompt": "x" * (MAX_TOKENIZE_CHARS + 1)}).encode()
            reply = await server.post("/tokenize", io.BytesIO(data))
            assert (reply.status, reply.error()["param"]) == (400, "prompt")
            data = json.dumps({"tokens": [65] * (MAX_DETOKENIZE_TOKENS + 1)}).encode()
            reply = await server.post("/detokenize", io.BytesIO(data))
            assert (reply.status, reply.error()["param"]) == (400, "tokens")

    asyncio.run(main())


def test_a_body_at_the_limit_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=SMALL) as server:
            body = b'{"prompt": "x"}'
            padded = body + b" " * (SMALL.max_body_bytes - len(body))
            assert (await server.post(COMPLETIONS, padded)).status == 200
            assert (await server.post(COMPLETIONS, padded + b" ")).status == 413

    asyncio.run(main())


def test_a_length_over_the_limit_is_refused_before_the_body_comes(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=SMALL) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(HEAD + b"Content-Length: 20000000\r\n\r\n")
            async with asyncio.timeout(3):
                assert (await reader.readline()).startswith(b"HTTP/1.1 413")
            writer.close()

    asyncio.run(main())


def test_many_tiny_chunks(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=SMALL) as server:
            head = HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            answer = await server.raw(head + b"1\r\n \r\n" * 150_000 + b"0\r\n\r\n", seconds=30)
            assert answer.startswith(b"HTTP/1.1 413"), answer[:100]

    asyncio.run(main())


def test_a_body_that_does_not_arrive_is_408(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, body_timeout=0.1) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(HEAD + b"Content-Length: 50\r\n\r\n{")
            async with asyncio.timeout(3):
                assert (await reader.readline()).startswith(b"HTTP/1.1 408")
            writer.close()

    asyncio.run(main())


def test_bytes_that_are_not_http_get_json(tmp_path: Path) -> None:
    heads = {
        "negative length": HEAD + b"Content-Length: -5\r\n\r\n",
        "length that is no number": HEAD + b"Content-Length: five\r\n\r\n",
        "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        "length and chunked": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "bad chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        "no method": b"hello there\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n",
        "header without colon": b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n",
        "bare line feeds": b"GET /health HTTP/1.1\nHost: localhost\n\n",
        "folded header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
    }

    async def main() -> None:
        async with serve(tmp_path) as server:
            for name, data in heads.items():
                answer = await server.raw(data)
                head, _, body = answer.partition(b"\r\n\r\n")
                assert head.split(b" ")[1] == b"400", (name, answer[:200])
                assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, (name, body)
                assert b"site-packages" not in body
            assert (await server.request("GET", "/health")).status == 200

    asyncio.run(main())


def test_small_writes_are_not_delayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[int] = []
    prepare = web.StreamResponse.prepare

    async def spying(response: web.StreamResponse, request: web.BaseRequest) -> object:
        assert request.transport is not None
        connection = request.transport.get_extra_info("socket")
        options.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        return await prepare(response, request)

    async def main() -> None:
        async with serve(tmp_path) as server:
            monkeypatch.setattr(web.StreamResponse, "prepare", spying)
            await server.post(COMPLETIONS, {"prompt": "x", "stream": True})

    asyncio.run(main())
    assert set(options) == {1}


def test_heads_over_a_limit_have_their_own_status(tmp_path: Path) -> None:
    config = ServerConfig(port=0, max_request_line=1000, max_header_bytes=2000, max_headers=20)
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    heads = {
        "path": (b"GET /" + b"x" * 1100 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"414", "allowed: 1000 bytes"),
        "query": (b"GET /health?" + b"x" * 10**5 + b" HTTP/1.1\r\n\r\n", b"414", "allowed: 1000 bytes"),
        "value": (get + b"X: " + b"x" * 2100 + b"\r\n\r\n", b"431", "allowed: 2000 bytes"),
        "name": (get + b"x" * 2100 + b": y\r\n\r\n", b"431", "allowed: 2000 bytes"),
        "value without end": (get + b"X: " + b"x" * 100_000, b"431", "allowed: 2000 bytes"),
        "number": (get + b"X: y\r\n" * 10_000 + b"\r\n", b"431", "allowed: 20"),
    }

    async def main() -> None:
        async with serve(tmp_path, server=config) as server:
            for name, (data, status, text) in heads.items():
                head, _, body = (await server.raw(data)).partition(b"\r\n\r\n")
                assert head.split(b" ")[1] == status, (name, head)
                assert text in json.loads(body)["error"]["message"], (name, body)
            with contextlib.suppress(ConnectionError):  # closed while the rest was still on its way
                assert b" 431 " in await server.raw(get + b"X: " + b"x" * 5_000_000)
            fits = get + b"".join(b"X-%d: %b\r\n" % (i, b"y" * 1900) for i in range(15)) + b"\r\n"
            assert (await server.raw(fits)).startswith(b"HTTP/1.1 200")

    asyncio.run(main())


def test_bodies_in_too_many_chunks_are_413_before_their_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=ServerConfig(port=0, max_body_chunks=1000)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 1001)
            async with asyncio.timeout(5):
                assert (await reader.readline()).startswith(b"HTTP/1.1 413")
            writer.close()
            head = HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            body = b'{"prompt": "x"}'
            tiny = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"1\r\n \r\n" * (1000 - len(body)) + b"0\r\n\r\n"
            assert (await server.raw(head + tiny)).startswith(b"HTTP/1.1 200")

    asyncio.run(main())


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_of_json_is_bounded(opening: str, closing: str) -> None:
    for depth, inner in ((10, "1"), (10, '"[{[{"'), (10, '"\\\\\\"[{"'), (9, "{}"), (9, '[], "]"')):
        body = opening * depth + inner + closing * depth
        check_depth(body.encode(), 10)
        with pytest.raises(InvalidRequestError, match="nested too deeply; allowed: 10"):
            check_depth(f"[{body}]".encode(), 10)
    check_depth(f"[{','.join([opening + '1' + closing] * 10_000)}]".encode(), 2)
    with pytest.raises(InvalidRequestError):
        check_depth((opening * 100_000).encode(), 10)


def test_a_body_that_is_too_deep_is_400(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path, server=ServerConfig(port=0, max_json_depth=10)) as server:
            for depth, refused in ((9, False), (10, True), (100_000, True)):
                reply = await server.post(CHAT, b'{"messages": %b%b}' % (b"[" * depth, b"]" * depth))
                assert reply.status == 400
                assert ("nested too deeply" in reply.error()["message"]) == refused

    asyncio.run(main())
