"""POST /tokenize and /detokenize, in vLLM's shapes: how the served model sees a text.

Knows nothing of generation.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from servd.api.chat.call import ChatCall
from servd.api.chat.plan import encode_call
from servd.api.chat.tools import check_json
from servd.api.conversation import MAX_TEMPLATE_VALUES
from servd.api.http.context import SERVICE
from servd.api.http.decode import decode_body, read_body
from servd.api.http.messages import ChatMessage, template_messages
from servd.api.http.openapi import Endpoint, Operation
from servd.api.http.replies import json_reply
from servd.api.http.reply_types import DetokenizeReply, TokenizeReply
from servd.api.http.schema.chat_tools import ToolDefinition, tools_of
from servd.api.service import MAX_DETOKENIZE_TOKENS, MAX_TOKENIZE_CHARS
from servd.errors import InvalidRequestError, NotFoundError
from servd.sampling_params import SamplingParams


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text, or messages as for a chat completion."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[ToolDefinition] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(request: web.Request) -> web.Response:
    """Token ids, their number, and the model's limit."""
    service = request.app[SERVICE]
    body = decode_body(await read_body(request), _TOKENIZE)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt and messages: allowed is exactly one of them", param="prompt")
    if body.messages is not None:
        check_json(body.chat_template_kwargs, "chat_template_kwargs", MAX_TEMPLATE_VALUES)
        call = ChatCall(
            template_messages(body.messages),
            SamplingParams(),
            tools=tools_of(body.tools),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
        )
        token_ids = await encode_call(service, call)
    else:
        token_ids = await service.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens)
    texts = await service.token_texts(token_ids) if body.return_token_strs else None
    return json_reply(
        {
            "count": len(token_ids),
            "max_model_len": service.engine.max_model_len,
            "tokens": token_ids,
            "token_strs": texts,
        }
    )


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids, special tokens included."""
    service = request.app[SERVICE]
    body = decode_body(await read_body(request), _DETOKENIZE)
    service.check_model(body.model)
    return json_reply({"prompt": await service.detokenize(body.tokens)})


ROUTES = [
    Endpoint(
        "POST", "/tokenize", tokenize,
        Operation(
            "Text to token ids", body=TokenizeRequest, reply=TokenizeReply, errors=(NotFoundError,),
            ranges={"prompt": {"maxLength": MAX_TOKENIZE_CHARS}},
        ),
    ),
    Endpoint(
        "POST", "/detokenize", detokenize,
        Operation(
            "Token ids to text", body=DetokenizeRequest, reply=DetokenizeReply, errors=(NotFoundError,),
            ranges={"tokens": {"maxItems": MAX_DETOKENIZE_TOKENS, "items": {"type": "integer", "minimum": 0}}},
        ),
    ),
]  # fmt: skip
