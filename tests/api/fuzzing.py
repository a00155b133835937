"""Random request bodies: JSON that nearly fits a route's types, and bytes that are nearly JSON. All from one seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import inspect as mi

TEXTS = (
    "", "x", "hi", "poem", "user", "assistant", "tool", "auto", "required", "none", "text", "json_schema", "object",
    "string", "fake", "../../etc/passwd", "\x00", "\u202e\u0007", "\ud83d\ude00", "<|im_end|>", "é" * 40, "9" * 400,
    "float", "base64", "http://127.0.0.1:9/x", "{{ 7*7 }}", "{% for i in range(10**9) %}{% endfor %}", "(a+)+b",
    "\r\nSet-Cookie: a=b", "%s%n", "'; DROP TABLE", "a" * 3000,
)  # fmt: skip
INTEGERS = (
    0, 1, 2, 3, 5, 7, 16, 20, 64, 256, 257, -1, -2, 1000, 2**31, 2**31 - 1, 2**32, 2**63, 2**64, -(2**63), 10**30,
)  # fmt: skip
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.5, 2.0, -1.0, 100.0, 1e-320, 1e308, 1e400, float("nan"), -float("inf"), 0.1)
TOKENS = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"\x00",
          b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\xef\xbb\xbf", b"//", b"[" * 200, b"0" * 400, b"-")  # fmt: skip
MAX_DEPTH = 6


class BodyMaker:
    """Makes bodies for the types that a route reads."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def body(self, kind: type[Any] | None, least: dict[str, Any]) -> bytes:
        """Mostly nearly right; now and then anything, and in a third of cases some bytes are changed."""
        draw = self.random.random()
        if kind is None or draw < 0.05:
            value = self.anything(0)
        else:
            value = self.of_type(mi.type_info(kind), 0)
            if isinstance(value, dict) and draw < 0.8:  # what is needed to get past the first checks
                share = self.random.choice((0.0, 0.2, 0.5))
                value = {k: v for k, v in value.items() if self.random.random() < share} | least
        data = json.dumps(value, ensure_ascii=self.random.random() < 0.5).encode(errors="surrogatepass")
        return self.mutated(data) if self.random.random() < 0.33 else data

    def of_type(self, info: mi.Type, depth: int) -> Any:
        """A value of the type; one in twelve is of another."""
        pick = self.random
        if pick.random() < 0.08 or depth > MAX_DEPTH:
            return self.anything(depth)
        match info:
            case mi.StructType() | mi.TypedDictType() | mi.DataclassType():
                names = [f for f in info.fields if f.required or pick.random() < min(0.5, 4 / len(info.fields))]
                tag = {info.tag_field: info.tag} if isinstance(info, mi.StructType) and info.tag_field else {}
                return tag | {f.encode_name: self.of_type(f.type, depth + 1) for f in names}
            case mi.UnionType():
                return self.of_type(pick.choice(info.types), depth)
            case mi.ListType() | mi.CollectionType():
                return [self.of_type(info.item_type, depth + 1) for _ in range(self._length())]
            case mi.VarTupleType():
                return [self.of_type(info.item_type, depth + 1) for _ in range(self._length())]
            case mi.DictType():
                return {pick.choice(TEXTS): self.of_type(info.value_type, depth + 1) for _ in range(self._length())}
            case mi.LiteralType():
                return pick.choice(info.values)
            case mi.StrType():
                return pick.choice(TEXTS)
            case mi.BoolType():
                return pick.random() < 0.5
            case mi.IntType():
                return pick.choice(INTEGERS[:8] if pick.random() < 0.7 else INTEGERS)
            case mi.FloatType():
                return pick.choice(FLOATS[:7] if pick.random() < 0.7 else FLOATS)
            case mi.NoneType():
                return None
        return self.anything(depth)

    def anything(self, depth: int) -> Any:
        """Any JSON."""
        pick = self.random
        makers: list[Callable[[], Any]] = [
            lambda: None, lambda: pick.random() < 0.5, lambda: pick.choice(INTEGERS), lambda: pick.choice(FLOATS),
            lambda: pick.choice(TEXTS),
        ]  # fmt: skip
        if depth < MAX_DEPTH:
            makers += [
                lambda: [self.anything(depth + 1) for _ in range(self._length())],
                lambda: {pick.choice(TEXTS): self.anything(depth + 1) for _ in range(self._length())},
            ]
        return pick.choice(makers)()

    def mutated(self, data: bytes) -> bytes:
        """Some bytes flipped, cut out, doubled, or replaced by what parsers stumble over."""
        pick, out = self.random, bytearray(data)
        for _ in range(pick.choice((1, 1, 2, 5))):
            at = pick.randrange(len(out) + 1)
            match pick.randrange(5):
                case 0 if at < len(out):
                    out[at] ^= 1 << pick.randrange(8)
                case 1:
                    del out[at : at + pick.choice((1, 3, len(out)))]
                case 2:
                    out[at:at] = out[at : at + pick.choice((1, 10, 50))]
                case _:
                    out[at:at] = pick.choice(TOKENS)
        return bytes(out)

    def _length(self) -> int:
        return self.random.choice((0, 1, 1, 2, 3, 8))


def types_of_module(module: Any) -> list[type[Any]]:
    """What a route's file decodes bodies into: the types of its decoders."""
    return [value.type for value in vars(module).values() if isinstance(value, msgspec.json.Decoder)]
