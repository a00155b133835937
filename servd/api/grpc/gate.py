"""What every gRPC call passes: an id, the key, and one line in the log when it is over.

Knows nothing of what calls do; prompts never reach the log. Health and reflection are not logged.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from servd.api.access import KeyRing, count_request, current_caller, set_caller
from servd.api.grpc.status import Context, abort_with
from servd.api.service import REQUEST_ID_SHAPE, set_call_id
from servd.errors import InvalidRequestError, ServdError

PROBES = (  # they carry no key
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
FREE_METHODS = frozenset(
    (
        *(f"/servd.v1.Inference/{name}" for name in (
            "Abort", "ListPrefixes", "GetPrefix", "DeletePrefix", "GetRequestRecord", "ListRequestRecords",
            "ListModels", "GetStatus",
        )),
        *(f"/inference.GRPCInferenceService/{name}" for name in (
            "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex",
            "ModelStreamInfer",  # each of its messages counts
        )),
    )
)  # fmt: skip; see access.count_request
MAX_OFFERED_KEYS = 4  # each unknown one is compared with all of the key file
OWN_METHODS = ("/servd.v1.", "/inference.")
REQUEST_ID_KEY = "x-request-id"

_log = logging.getLogger("servd.grpc")

Metadata = Sequence[tuple[str, str | bytes]] | None
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # not subscriptable when it runs


@dataclass(frozen=True, slots=True)
class CallInfo:
    """What is known of a call before its message is read."""

    method: str
    request_id: str  # of this call, for the logs; the client's own if it is harmless
    started: float  # time.monotonic() seconds


def identify_caller(keys: KeyRing, metadata: Metadata) -> None:
    """Make the key's holder the caller of this task. Raises AuthenticationError."""
    set_caller(keys.caller(_offered_keys(metadata)))


def _offered_keys(metadata: Metadata) -> list[str]:
    offered = []
    for name, value in metadata or ():
        text = value if isinstance(value, str) else value.decode("latin-1")
        scheme, _, key = ("Bearer", "", text) if name == "x-api-key" else text.partition(" ")
        if name in ("authorization", "x-api-key") and scheme.lower() == "bearer":
            offered.append(key)
    return offered[:MAX_OFFERED_KEYS]


def _offered_request_id(metadata: Metadata) -> str:
    offered = next((value for name, value in metadata or () if name == REQUEST_ID_KEY), "")
    harmless = isinstance(offered, str) and REQUEST_ID_SHAPE.fullmatch(offered)
    return str(offered) if harmless else uuid.uuid4().hex


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls with a key pass; its answer carries `x-request-id`."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's own handler, with a log line around it, or one that refuses."""
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        info = CallInfo(method, _offered_request_id(metadata), time.monotonic())
        set_call_id(info.request_id)  # interceptor and handler run in one task
        if not method.startswith(PROBES):
            try:
                identify_caller(self._keys, metadata)
                if method not in FREE_METHODS:
                    count_request()
            except ServdError as error:
                return _observed(_refusal(error), info)
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(OWN_METHODS):
            return handler
        # A stream may outlive its key, which is therefore looked at again with each of its messages.
        return _observed(handler, info, on_message=partial(identify_caller, self._keys, metadata))


def _refusal(error: ServdError) -> Handler:
    async def refuse(request: bytes, context: Context) -> None:
        await abort_with(context, error)

    return grpc.unary_unary_rpc_method_handler(refuse)


_KINDS = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


def _observed(handler: Handler, info: CallInfo, on_message: Callable[[], None] = lambda: None) -> Handler:
    """The same handler, which is a coroutine, between the id and the log line.

    It is handed the message's bytes: what grpc itself cannot decode it answers with UNKNOWN, and a trace in the log.
    """
    (kind,) = [kind for kind in _KINDS if getattr(handler, kind) is not None]
    inner: Callable[[Any, Context], Awaitable[Any]] = getattr(handler, kind)
    decode = handler.request_deserializer

    async def run(request: Any, context: Context) -> Any:
        if decode is None:
            return await inner(request, context)
        if handler.request_streaming:
            return await inner(_all_decoded(decode, request, on_message), context)
        try:
            message = _decoded(decode, request)
        except InvalidRequestError as error:
            await abort_with(context, error)
        return await inner(message, context)

    async def observe(request: Any, context: Context) -> Any:
        code = grpc.StatusCode.CANCELLED  # also of a deadline: the client's library ends the call for both
        try:
            await context.send_initial_metadata(((REQUEST_ID_KEY, info.request_id),))
            reply = await run(request, context)
            code = grpc.StatusCode.OK
            return reply
        except grpc.aio.AbortError:
            code = context.code() or code
            raise
        finally:
            milliseconds = (time.monotonic() - info.started) * 1000
            _log.info(
                "%s %s %.0f ms %s %s %s", info.method[:100], code.name, milliseconds, context.peer(),
                current_caller().name, info.request_id,
            )  # fmt: skip

    return _KINDS[kind](observe, None, handler.response_serializer)


async def _all_decoded(
    decode: Callable[[bytes], Any], requests: AsyncIterator[bytes], on_message: Callable[[], None]
) -> AsyncIterator[Any]:
    async for request in requests:
        on_message()
        yield _decoded(decode, request)


def _decoded(decode: Callable[[bytes], Any], request: bytes) -> Any:
    try:
        return decode(request)
    except DecodeError as error:
        raise InvalidRequestError(f"the message cannot be decoded: {error}") from None
