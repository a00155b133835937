"""GET /v1/models and /v1/models/{id}: what is served here.

Knows nothing of how the model came here.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from servd.api.http.context import CALLER, SERVICE
from servd.api.http.openapi import Endpoint, Operation
from servd.api.http.query import whole_number
from servd.api.http.replies import json_reply
from servd.api.http.reply_types import Model, ModelList
from servd.api.service import InferenceService
from servd.errors import NotFoundError

MAX_LIMIT = 1000  # Anthropic's


async def list_models(request: web.Request) -> web.Response:
    """The one model, if the caller may use it. Neither `limit` nor `client_version` changes a list of one."""
    whole_number(request.query, "limit", MAX_LIMIT, 1, MAX_LIMIT)
    service = request.app[SERVICE]
    models = [_model(service)] if request[CALLER].may_use(service.model_name) else []
    return json_reply({"object": "list", "data": models})


async def retrieve_model(request: web.Request) -> web.Response:
    """The model of that name. Raises NotFoundError."""
    service = request.app[SERVICE]
    service.check_model(request.match_info["model"])
    return json_reply(_model(service))


def _model(service: InferenceService) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "servd",
        "max_model_len": service.engine.max_model_len,  # vLLM's extension: clients size their prompts by it
    }


# What clients of other dialects send along.
_QUERY: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT},
    "client_version": {"type": "string"},
}

ROUTES = [
    Endpoint("GET", "/v1/models", list_models, Operation("List the models", reply=ModelList, query=_QUERY)),
    Endpoint(
        "GET", "/v1/models/{model:.+}", retrieve_model,
        Operation("One model", reply=Model, errors=(NotFoundError,)),
    ),
]  # fmt: skip
