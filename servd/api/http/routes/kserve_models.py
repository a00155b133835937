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
from servd.api.http.kserve import MODEL_PATHS, model_of
from servd.api.http.openapi import Endpoint, Operation
from servd.api.http.replies import json_reply
from servd.api.http.reply_types import KServeErrorReply
from servd.api.kserve import model
from servd.api.kserve.tensors import TensorSpec
from servd.api.service import InferenceService
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
    return json_reply({"live": True})


async def ready(request: web.Request) -> web.Response:
    """200 if requests are taken, else 503."""
    return _readiness(request.app[SERVICE], {})


async def model_ready(request: web.Request) -> web.Response:
    """The same of a model; 404 for one that does not exist."""
    service = _of_model(request).app[SERVICE]
    return _readiness(service, {"name": service.model_name})


def _readiness(service: InferenceService, about: dict[str, Any]) -> web.Response:
    is_ready = model.is_ready(service)
    response = json_reply(about | {"ready": is_ready})
    if not is_ready:
        response.set_status(503)
    return response


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


_SERVER = Operation("The server", reply=dict[str, Any], error=KServeErrorReply)
_PROBE = Operation("A probe", reply=dict[str, Any], replies={503: dict[str, Any]}, public=True, error=KServeErrorReply)
_MODEL_PROBE = Operation(
    "Whether the model takes requests", reply=dict[str, Any], replies={503: dict[str, Any]}, errors=(NotFoundError,),
    error=KServeErrorReply,
)  # fmt: skip
_MODEL = Operation("About the model", reply=dict[str, Any], errors=(NotFoundError,), error=KServeErrorReply)
_LIST = Operation("The models there are", reply=list[dict[str, Any]], error=KServeErrorReply)
_ABOUT_A_MODEL = {"/config": model_config, "/stats": model_statistics, "": model_metadata}

ROUTES = [
    Endpoint("GET", "/v2", server_metadata, _SERVER),
    Endpoint("GET", "/v2/health/live", live, _PROBE),
    Endpoint("GET", "/v2/health/ready", ready, _PROBE),
    Endpoint("GET", "/v2/models/stats", model_statistics, _MODEL),
    Endpoint("POST", "/v2/repository/index", repository_index, _LIST),
    *(Endpoint("GET", f"{path}/ready", model_ready, _MODEL_PROBE) for path in MODEL_PATHS),
    *(
        Endpoint("GET", path + end, handler, _MODEL)
        for end, handler in _ABOUT_A_MODEL.items()
        for path in MODEL_PATHS
    ),
]
