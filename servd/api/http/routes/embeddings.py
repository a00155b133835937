"""POST /v1/embeddings: texts or token ids in, one vector each out, as floats or base64.

Knows nothing of how hidden states are pooled.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec
from aiohttp import web

from servd.api.http.context import SERVICE
from servd.api.http.decode import decode_body, read_body
from servd.api.http.field_ranges import between, length
from servd.api.http.generation import time_left
from servd.api.http.openapi import GENERATES, Endpoint, Operation
from servd.api.http.replies import json_reply
from servd.api.http.reply_types import EmbeddingList
from servd.api.http.schema.checks import check_length, check_range, one_or_many
from servd.api.http.schema.generation import MAX_DEADLINE_MS, MAX_PRIORITY, MAX_SALT_CHARS
from servd.api.service import InferenceService
from servd.engine.embeddings import Embedding
from servd.errors import InvalidRequestError
from servd.sampling_params import POOLINGS

MAX_INPUTS = 2048  # OpenAI's
ENCODING_FORMATS = ("float", "base64")


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body: OpenAI's fields, and vLLM's and servd's extensions."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: str | None = None  # float or base64 (little-endian float32)
    dimensions: int | None = None  # the first so many values
    user: str | None = None  # no effect here
    # extensions
    pooling: str | None = None  # last, mean or cls
    normalize: bool = True  # to length 1
    truncate_prompt_tokens: int | None = None  # keep the last so many tokens; -1: as many as the context holds
    add_special_tokens: bool = True
    priority: int = 0
    deadline_ms: int | None = None  # the whole call, from arrival
    cache_salt: str | None = None

    def check(self, max_model_len: int) -> None:
        """Raise InvalidRequestError naming the first field out of its range."""
        _check_choice("encoding_format", self.encoding_format, ENCODING_FORMATS)
        _check_choice("pooling", self.pooling, POOLINGS)
        if self.truncate_prompt_tokens not in (None, -1):
            check_range("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, max_model_len)
        check_range("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.deadline_ms is not None:
            check_range("deadline_ms", self.deadline_ms, 1, MAX_DEADLINE_MS)
        if self.cache_salt is not None:
            check_length("cache_salt", self.cache_salt, 1, MAX_SALT_CHARS, "characters")

    def inputs(self) -> list[str | list[int]]:
        """The inputs, one or many. Raises InvalidRequestError for an empty, mixed or overlong list."""
        return one_or_many("input", self.input, MAX_INPUTS)


_DECODER = msgspec.json.Decoder(EmbeddingRequest)


async def create_embeddings(request: web.Request) -> web.Response:
    """One vector an input, in order."""
    service = request.app[SERVICE]
    body = decode_body(await read_body(request), _DECODER)
    service.check_model(body.model)
    body.check(service.engine.max_model_len)
    inputs = body.inputs()
    service.engine.check_room()
    names = ["input"] if len(inputs) == 1 else [f"input[{i}]" for i in range(len(inputs))]
    prompts = [await _encode(service, body, given, name) for given, name in zip(inputs, names, strict=True)]
    timeout = time_left(request, body.deadline_ms, "input")
    embeddings = await service.embed(
        prompts, request_id=service.new_request_id("embd"), pooling=body.pooling, dimensions=body.dimensions,
        normalize=body.normalize, priority=body.priority, timeout=timeout, cache_salt=body.cache_salt or "",
        prompt_params=names,
    )  # fmt: skip
    num_tokens = sum(embedding.num_prompt_tokens for embedding in embeddings)
    return json_reply(
        {
            "object": "list",
            "data": [_entry(i, embedding, body.encoding_format) for i, embedding in enumerate(embeddings)],
            "model": service.model_name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


async def _encode(
    service: InferenceService, body: EmbeddingRequest, given: str | list[int], name: str
) -> list[int]:
    keep, limit = body.truncate_prompt_tokens, service.engine.max_model_len
    if keep is None:
        if not isinstance(given, str) and len(given) > limit:  # before millions of ids are looked at one by one
            raise InvalidRequestError(f"{name} has {len(given)} tokens; allowed: at most {limit}", param=name)
        return await service.encode_prompt(given, add_special_tokens=body.add_special_tokens, param=name)
    if isinstance(given, str):
        token_ids = await service.tokenize(given, add_special_tokens=body.add_special_tokens, param=name)
    else:
        token_ids = given
    kept = token_ids[-(limit if keep == -1 else keep) :]
    return await service.encode_prompt(kept, param=name)


def _entry(index: int, embedding: Embedding, encoding_format: str | None) -> dict[str, Any]:
    shown: object = embedding.values.tolist()
    if encoding_format == "base64":
        shown = base64.b64encode(embedding.to_bytes()).decode()
    return {"object": "embedding", "index": index, "embedding": shown}


def _check_choice(field: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise InvalidRequestError(f"{field} is {value[:100]!r}; allowed: {', '.join(allowed)}", param=field)


ROUTES = [
    Endpoint(
        "POST", "/v1/embeddings", create_embeddings,
        Operation(
            "Turn texts into vectors", body=EmbeddingRequest, reply=EmbeddingList, errors=GENERATES,
            ranges={
                "input": {"minLength": 1, "minItems": 1},
                "encoding_format": {"enum": [None, *ENCODING_FORMATS]},
                "dimensions": between(1, 1 << 31),
                "pooling": {"enum": [None, *POOLINGS]},
                "truncate_prompt_tokens": between(-1, 1 << 31),
                "priority": between(-MAX_PRIORITY, MAX_PRIORITY),
                "deadline_ms": between(1, MAX_DEADLINE_MS),
                "cache_salt": length(1, MAX_SALT_CHARS),
            },
        ),
    )
]  # fmt: skip
