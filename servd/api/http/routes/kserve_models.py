"""GET /v2 and the paths below it: the Open Inference Protocol's health, metadata, configuration and counts.

Knows nothing of inference requests.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

import servd
from servd.api.http.context import SERVICE
from servd.api.http.decode import decode_body, read_body
from servd.api.http.kserve import MODEL_PATHS, model_of, protocol_errors
from servd.api.http.openapi import Endpoint, Operation
from servd.api.http.replies import json_reply
from servd.api.http.reply_types import KServeErrorReply
from servd.api.kserve import model
from servd.api.kserve.tensors import TensorSpec
from servd.errors import NotFoundError


class IndexBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of /v2/repository/index, which may also be empty."""

    ready: bool = False


_INDEX = msgspec.json.Decoder(IndexBody)


async def server_metadata(request: web.Request) -> web.Response:
    """Name, version, extensions."""
    return json_reply({"name": "servd", "version": servd.__version__, "extensions": list(model.EXTENSIONS)})


async def live(request: web.Request) -> web.Response:
    """Who answers is alive."""
    return web.Response()


async def ready(request: web.Request) -> web.Response:
    """200 if requests are taken, else 503."""
    return web.Response(status=200 if model.is_ready(request.app[SERVICE]) else 503)


async def model_ready(request: web.Request) -> web.Response:
    """The same of a model; 404 for one that does not exist."""
    return await ready(_of_model(request))


async def model_metadata(request: web.Request) -> web.Response:
    """The model's tensors."""
    service = _of_model(request).app[SERVICE]
    return json_reply(
        {
            "name": service.model_name,
            "versions": [model.VERSION],
            "platform": model.PLATFORM,
            "inputs": [_metadata(spec) for spec in model.INPUTS.values()],
            "outputs": [_metadata(spec) for spec in model.OUTPUTS.values()],
        }
    )


async def model_config(request: web.Request) -> web.Response:
    """The same in Triton's words."""
    service = _of_model(request).app[SERVICE]
    inputs = [_config(spec) | {"optional": spec.name != model.TEXT_INPUT} for spec in model.INPUTS.values()]
    outputs = [_config(spec) for spec in model.OUTPUTS.values()]
    return json_reply(
        {
            "name": service.model_name, "platform": model.PLATFORM, "backend": model.PLATFORM, "max_batch_size": 0,
            "input": inputs, "output": outputs, "model_transaction_policy": {"decoupled": True},
        }
    )  # fmt: skip


async def model_statistics(request: web.Request) -> web.Response:
    """Counts and times since the start."""
    service = _of_model(request).app[SERVICE]
    counts = model.statistics(service)
    times = {
        "success": {"count": counts.num_successes, "ns": counts.success_ns},
        "fail": {"count": counts.num_failures, "ns": 0},
        "queue": {"count": counts.num_queued, "ns": counts.queue_ns},
    }
    stats = {
        "name": service.model_name, "version": model.VERSION, "inference_count": counts.num_successes,
        "execution_count": counts.num_steps, "inference_stats": times,
    }  # fmt: skip
    return json_reply({"model_stats": [stats]})


async def repository_index(request: web.Request) -> web.Response:
    """The one model. The body may ask for ready ones alone."""
    service = request.app[SERVICE]
    body = await read_body(request)
    asked = decode_body(body, _INDEX) if body.strip() else IndexBody()
    if asked.ready and not model.is_ready(service):
        return json_reply([])
    return json_reply([{"name": service.model_name, "version": model.VERSION, "state": model.state_name(service)}])


def _of_model(request: web.Request) -> web.Request:
    model.check_model(request.app[SERVICE], *model_of(request))
    return request


def _config(spec: TensorSpec) -> dict[str, Any]:
    data_type = "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"
    return {"name": spec.name, "data_type": data_type, "dims": list(spec.shape)}


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


_SERVER = Operation("The server", reply=dict[str, Any])
_PROBE = Operation("A probe", reply=dict[str, Any], replies={503: dict[str, Any]}, public=True)
_MODEL = Operation("About the model", reply=dict[str, Any], errors=(NotFoundError,), error=KServeErrorReply)
_LIST = Operation("The models there are", reply=list[dict[str, Any]], error=KServeErrorReply)
_ABOUT_A_MODEL = {"/ready": model_ready, "/config": model_config, "/stats": model_statistics, "": model_metadata}

ROUTES = [
    Endpoint("GET", "/v2", server_metadata, _SERVER),
    Endpoint("GET", "/v2/health/live", live, _PROBE),
    Endpoint("GET", "/v2/health/ready", ready, _PROBE),
    Endpoint("GET", "/v2/models/stats", protocol_errors(model_statistics), _MODEL),
    Endpoint("POST", "/v2/repository/index", protocol_errors(repository_index), _LIST),
    *(
        Endpoint("GET", path + end, protocol_errors(handler), _MODEL)
        for end, handler in _ABOUT_A_MODEL.items()
        for path in MODEL_PATHS
    ),
]
