"""What every gRPC call passes: an id, the key, and one line in the log when it is over.

Knows nothing of what calls do; prompts never reach the log. Health and reflection are not logged.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio

from servd.api.access import ANONYMOUS, Caller
from servd.api.grpc.status import Context, abort_with
from servd.errors import AuthenticationError, ServdError

HEALTH_METHODS = "/grpc.health.v1.Health/"  # probes carry no key
OWN_METHODS = ("/servd.v1.", "/inference.")
REQUEST_ID_KEY = "x-request-id"

_REQUEST_ID_SHAPE = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger("servd.grpc")

Metadata = Mapping[str, str]  # a call's metadata of text; keys are lower case
Authenticate = Callable[[Metadata], Caller]
"""Who calls, by a call's metadata. Raises AuthenticationError."""

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # not subscriptable when it runs


@dataclass(frozen=True, slots=True)
class CallInfo:
    """What is known of a call before its message is read."""

    method: str
    request_id: str  # of this call, for the logs; the client's own if it is harmless
    caller: Caller
    started: float  # time.monotonic() seconds


CALL: ContextVar[CallInfo] = ContextVar("servd_grpc_call")
"""Set for the task that handles a call, by the gate."""


def single_key(api_key: str | None) -> Authenticate:
    """One key for all (`authorization: Bearer KEY` or `x-api-key: KEY`), or none needed."""

    def authenticate(metadata: Metadata) -> Caller:
        if api_key is None or any(_same(offered, api_key) for offered in offered_keys(metadata)):
            return ANONYMOUS
        raise AuthenticationError("no valid API key; send metadata authorization: Bearer KEY or x-api-key: KEY")

    return authenticate


def offered_keys(metadata: Metadata) -> list[str]:
    """The keys that a call carries."""
    scheme, _, token = metadata.get("authorization", "").partition(" ")
    keys = [token.strip()] if scheme.lower() == "bearer" else []
    return [*keys, metadata["x-api-key"]] if "x-api-key" in metadata else keys


def _same(offered: str, key: str) -> bool:
    return hmac.compare_digest(offered.encode(errors="surrogateescape"), key.encode())


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls with a key pass; its answer carries `x-request-id`."""

    def __init__(self, authenticate: Authenticate) -> None:
        self._authenticate = authenticate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's own handler, with a log line around it, or one that refuses."""
        method = handler_call_details.method
        metadata = {key: value for key, value in handler_call_details.invocation_metadata if isinstance(value, str)}
        offered = metadata.get(REQUEST_ID_KEY, "")
        request_id = offered if _REQUEST_ID_SHAPE.fullmatch(offered) else uuid.uuid4().hex
        info = CallInfo(method, request_id, ANONYMOUS, time.monotonic())
        if not method.startswith(HEALTH_METHODS):
            try:
                info = CallInfo(method, request_id, self._authenticate(metadata), info.started)
            except ServdError as error:
                return _observed(_refusal(error), info)
        CALL.set(info)  # interceptor and handler run in one task
        handler = await continuation(handler_call_details)
        return _observed(handler, info) if handler is not None and method.startswith(OWN_METHODS) else handler


def _refusal(error: ServdError) -> Handler:
    async def refuse(request: bytes, context: Context) -> None:
        await abort_with(context, error)

    return grpc.unary_unary_rpc_method_handler(refuse)


_KINDS = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


def _observed(handler: Handler, info: CallInfo) -> Handler:
    """The same handler, which is a coroutine, between the id and the log line."""
    (kind,) = [kind for kind in _KINDS if getattr(handler, kind) is not None]
    inner: Callable[[Any, Context], Awaitable[Any]] = getattr(handler, kind)

    async def observe(request: Any, context: Context) -> Any:
        code = grpc.StatusCode.CANCELLED  # also of a deadline: the client's library ends the call for both
        try:
            await context.send_initial_metadata(((REQUEST_ID_KEY, info.request_id),))
            reply = await inner(request, context)
            code = grpc.StatusCode.OK
            return reply
        except grpc.aio.AbortError:
            code = context.code() or code
            raise
        finally:
            milliseconds = (time.monotonic() - info.started) * 1000
            _log.info(
                "%s %s %.0f ms %s %s %s", info.method[:100], code.name, milliseconds, context.peer(),
                info.caller.name, info.request_id,
            )  # fmt: skip

    return _KINDS[kind](observe, handler.request_deserializer, handler.response_serializer)
