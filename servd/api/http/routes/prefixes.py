"""/v1/prefixes: pin the beginning of many prompts, list, look at and delete the pins of one's tenant.

Knows nothing of blocks and quotas.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from servd.api.chat.call import ChatCall
from servd.api.chat.plan import plan_chat
from servd.api.conversation import MAX_MESSAGES
from servd.api.http.context import SERVICE
from servd.api.http.decode import decode_body, read_body
from servd.api.http.field_ranges import TOKEN_ID, between, length
from servd.api.http.messages import ChatMessage, template_messages
from servd.api.http.openapi import GENERATES, Endpoint, Operation
from servd.api.http.replies import json_reply
from servd.api.http.reply_types import DeletedPrefix, Prefix, PrefixList
from servd.api.http.schema.checks import check_length
from servd.api.http.schema.generation import MAX_SALT_CHARS
from servd.api.service import InferenceService
from servd.engine.prefix_pins import (
    DEFAULT_TTL_SECONDS,
    MAX_NAME_CHARS,
    MAX_TTL_SECONDS,
    MIN_TTL_SECONDS,
    PrefixPin,
)
from servd.errors import InvalidRequestError, NotFoundError
from servd.sampling_params import SamplingParams


class PrefixRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body: exactly one of text, messages and prompt_token_ids."""

    model: str | None = None
    text: str | None = None
    messages: list[ChatMessage] | None = None  # as the first ones of a chat
    prompt_token_ids: list[int] | None = None
    ttl_seconds: float = DEFAULT_TTL_SECONDS
    name: str | None = None  # for people
    cache_salt: str | None = None  # of the requests that are to find it
    add_special_tokens: bool = True  # to text

    def check(self) -> None:
        """Raise InvalidRequestError unless one form of the prefix is given."""
        if sum(form is not None for form in (self.text, self.messages, self.prompt_token_ids)) != 1:
            raise InvalidRequestError(
                "text, messages and prompt_token_ids: allowed is exactly one of them", param="text"
            )
        if self.cache_salt is not None:
            check_length("cache_salt", self.cache_salt, 1, MAX_SALT_CHARS, "characters")

    async def encode(self, service: InferenceService) -> tuple[str, list[int]]:
        """The field that was given, and its tokens."""
        if self.messages is not None:
            call = ChatCall(template_messages(self.messages), SamplingParams(), add_generation_prompt=False)
            return "messages", (await plan_chat(service, call)).prompt_token_ids
        if self.text is not None:
            add = self.add_special_tokens
            return "text", await service.encode_prompt(self.text, add_special_tokens=add, param="text")
        token_ids, limit = self.prompt_token_ids or [], service.engine.max_model_len
        if len(token_ids) > limit:  # before millions of ids are looked at one by one
            raise InvalidRequestError(
                f"prompt_token_ids has {len(token_ids)} tokens; allowed: at most {limit}", param="prompt_token_ids"
            )
        return "prompt_token_ids", await service.encode_prompt(token_ids, param="prompt_token_ids")


_DECODER = msgspec.json.Decoder(PrefixRequest)


async def create_prefix(request: web.Request) -> web.Response:
    """Answers when the prefix is computed; one that is pinned already lives on from now."""
    service = request.app[SERVICE]
    body = decode_body(await read_body(request), _DECODER)
    service.check_model(body.model)
    body.check()
    service.engine.check_room()
    param, token_ids = await body.encode(service)
    pin = await service.create_prefix(
        token_ids, ttl_seconds=body.ttl_seconds, name=body.name, cache_salt=body.cache_salt or "", prompt_param=param
    )
    return json_reply(_as_dict(pin))


async def list_prefixes(request: web.Request) -> web.Response:
    """All pins of the caller's tenant, oldest first."""
    return json_reply({"object": "list", "data": [_as_dict(pin) for pin in request.app[SERVICE].list_prefixes()]})


async def retrieve_prefix(request: web.Request) -> web.Response:
    """One pin."""
    return json_reply(_as_dict(request.app[SERVICE].get_prefix(request.match_info["id"])))


async def delete_prefix(request: web.Request) -> web.Response:
    """Let go of one; requests that use its blocks keep them."""
    pin_id = request.match_info["id"]
    request.app[SERVICE].delete_prefix(pin_id)
    return json_reply({"id": pin_id, "object": "prefix", "deleted": True})


def _as_dict(pin: PrefixPin) -> dict[str, Any]:
    return {
        "id": pin.id,
        "object": "prefix",
        "name": pin.name,
        "state": pin.state,
        "num_tokens": pin.num_tokens,
        "num_blocks": pin.num_blocks,
        "bytes": pin.num_bytes,
        "created_at": int(pin.created_at),
        "expires_at": int(pin.expires_at),
    }


ROUTES = [
    Endpoint(
        "POST", "/v1/prefixes", create_prefix,
        Operation(
            "Pin the beginning of prompts", body=PrefixRequest, reply=Prefix, errors=GENERATES,
            ranges={
                "text": {"minLength": 1},
                "messages": {"minItems": 1, "maxItems": MAX_MESSAGES},
                "prompt_token_ids": {"minItems": 1, "items": TOKEN_ID},
                "ttl_seconds": between(MIN_TTL_SECONDS, MAX_TTL_SECONDS),
                "name": {"maxLength": MAX_NAME_CHARS},
                "cache_salt": length(1, MAX_SALT_CHARS),
            },
        ),
    ),
    Endpoint("GET", "/v1/prefixes", list_prefixes, Operation("All pins", reply=PrefixList)),
    Endpoint("GET", "/v1/prefixes/{id}", retrieve_prefix, Operation("One pin", reply=Prefix, errors=(NotFoundError,))),
    Endpoint(
        "DELETE", "/v1/prefixes/{id}", delete_prefix,
        Operation("Let go of a pin", reply=DeletedPrefix, errors=(NotFoundError,)),
    ),
]  # fmt: skip
