"""Bodies that are not JSON, or JSON of the wrong kind: always 400 (or 200), never 500, and the engine lives on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servd.api.http.decode import decode_body
from servd.api.http.schema import ChatCompletionRequest, CompletionRequest
from servd.errors import InvalidRequestError
from tests.api.http.serving import CHAT, COMPLETIONS, serve

MALFORMED = {
    "empty": b"",
    "spaces": b"  \n ",
    "array": b"[]",
    "number": b"3",
    "string": b'"x"',
    "null": b"null",
    "true": b"true",
    "cut off": b'{"prompt": "x"',
    "cut off in a string": b'{"prompt": "x',
    "trailing comma": b'{"prompt": "x",}',
    "trailing text": b'{"prompt": "x"} {}',
    "single quotes": b"{'prompt': 'x'}",
    "comment": b'{"prompt": "x" /* no */}',
    "bare key": b'{prompt: "x"}',
    "bare NaN": b"NaN",
    "leading zero": b'{"prompt": "x", "n": 01}',
    "hexadecimal": b'{"prompt": "x", "n": 0x1}',
    "plus sign": b'{"prompt": "x", "n": +1}',
    "lonely minus": b'{"prompt": "x", "n": -}',
    "number too large": b'{"prompt": "x", "temperature": 1e400}',
    "integer too large": b'{"prompt": "x", "n": 1' + b"0" * 5000 + b"}",
    "control character": b'{"prompt": "a\x00b"}',
    "newline in a string": b'{"prompt": "a\nb"}',
    "bad escape": b'{"prompt": "\\q"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate in the middle": b'{"prompt": "\\ud800 and more text", "n": 1}',
    "surrogates the wrong way round": b'{"prompt": "\\ude00\\ud83d"}',
    "surrogate in a key": b'{"prompt": "x", "\\ud800": 1}',
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "UTF-8 of a surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "deep arrays": b"[" * 100_000,
    "deep objects": b'{"prompt":' * 100_000,
    "deep in an ignored field": b'{"prompt": "x", "suffix": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "900 deep in an ignored field": b'{"prompt": "x", "suffix": ' + b"[" * 900 + b"]" * 900 + b"}",
    "quotes without end": b'{"prompt": "' + b'\\"' * 200_000 + b"\x01",
    "form": b"prompt=x&n=1",
    "binary": bytes(range(256)),
}


def test_malformed_bodies(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            for name, body in MALFORMED.items():
                for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
                    reply = await server.post(path, body)
                    assert reply.status == 400, (name, path, reply.status, reply.body[:200])
                    message = reply.error()["message"]
                    assert "site-packages" not in message and "0x7" not in message, message
            assert (await server.post(COMPLETIONS, b'{"prompt": "x"}')).status == 200

    asyncio.run(main())


def test_unusual_but_valid_bodies(tmp_path: Path) -> None:
    async def main() -> None:
        async with serve(tmp_path) as server:
            for body in (
                b' \r\n\t{"prompt": "x"}\n ',
                b'{"prompt": "y", "prompt": "x"}',
                b'{"prompt": "\\u0000\\ud83d\\ude00"}',
                b'{"prompt": "x", "temperature": -0.0}',
                b'{"prompt": "x", "temperature": 1E0}',
                b'{"prompt": "x", "stop": null, "n": null, "logit_bias": null, "temperature": null, "model": null}',
                json.dumps({"prompt": "<|im_end|>\u202e\u0007 \ufeff'\"\\; DROP TABLE"}).encode(),
            ):
                for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/json; charset=utf-16"}):
                    reply = await server.post(COMPLETIONS, body, headers=headers)
                    assert reply.status == 200, (body, reply.body)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"temperature": NaN}', "temperature is NaN; allowed: a finite number"),
        (b'{"user": "{\\"seed\\":", "top_p": -Infinity}', "top_p is -Infinity; allowed: a finite number"),
        (b'{"logit_bias": {"5": 1, "6": Infinity}}', "logit_bias is Infinity; allowed: a finite number"),
        (b'{"stop": ["\\"}", nan]}', "stop is nan; allowed: a finite number"),
        (b'{"seed": 1e999}', "seed is a number too large to hold; allowed: a finite number"),
        (b'{"seed": tru}', "seed: the body is not valid JSON (invalid character"),
        (b'{"\\ud800x": 1}', "the body is not valid JSON"),
    ],
)
def test_syntax_errors_name_the_field_they_are_in(body: bytes, message: str) -> None:
    for kind in (CompletionRequest, ChatCompletionRequest):
        with pytest.raises(InvalidRequestError) as caught:
            decode_body(body, msgspec.json.Decoder(kind))
        assert message in caught.value.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted({*CompletionRequest.__struct_fields__, *ChatCompletionRequest.__struct_fields__}))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bodies=st.lists(st.dictionaries(FIELDS, JSON, max_size=4), min_size=1, max_size=20))
def test_any_json_in_any_field(tmp_path: Path, bodies: list[dict[str, object]]) -> None:
    async def main() -> None:
        async with serve(tmp_path, max_position_embeddings=64, settings={"max_model_len": 64}) as server:
            for fields in bodies:
                for path, needed in (
                    (COMPLETIONS, {"prompt": "x"}),
                    (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
                ):
                    reply = await server.post(path, needed | fields)
                    assert reply.status in (200, 400, 404, 408), (fields, reply.body)
                    if reply.status != 200:
                        reply.error()

    asyncio.run(main())
