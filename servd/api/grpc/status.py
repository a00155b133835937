"""ServdError to gRPC status: the code, the message, and google.rpc details that name the field to blame.

The one place where a gRPC call learns of an error. Knows nothing of what the call does.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from servd.errors import (
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
    ServdError,
)
from servd.sampling_params import SamplingParams

Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "servd"
# The message may quote what the client sent. It travels three times in the trailer, of which clients take 8 KiB.
MAX_MESSAGE_BYTES = 1000


def error_details(error: ServdError, sampling_field: str = "sampling_params") -> bytes:
    """A serialized google.rpc.Status: ErrorInfo always, BadRequest for a field, RetryInfo for an overload.

    `sampling_field`: the request's field that holds the sampling parameters, "" if none does.
    """
    code: grpc.StatusCode = grpc.StatusCode[error.grpc_code]
    message = status_message(error)
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=(error.code or error.type).upper(), domain=ERROR_DOMAIN)
    details = [info]
    if isinstance(error, InvalidRequestError) and error.param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_shortened(_field_path(error.param, sampling_field)), description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, OverloadedError):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(retry)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    serialized: bytes = status.SerializeToString()
    return serialized


def status_message(error: ServdError) -> str:
    """What the client reads of an error, short enough to arrive."""
    return _shortened(error.message)


def _shortened(text: str) -> str:
    return text.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore")


def _field_path(param: str, sampling_field: str) -> str:
    return f"{sampling_field}.{param}" if sampling_field and param in SamplingParams.__struct_fields__ else param


async def abort_with(context: Context, error: ServdError, sampling_field: str = "sampling_params") -> None:
    """End the call with the error's status. Raises grpc's AbortError, which the server expects."""
    trailer = ((DETAILS_KEY, error_details(error, sampling_field)),)
    await context.abort(grpc.StatusCode[error.grpc_code], status_message(error), trailer)


@asynccontextmanager
async def errors_as_status(context: Context, sampling_field: str = "sampling_params") -> AsyncIterator[None]:
    """What the block raises ends the call with its status; what was not raised on purpose is logged and hidden."""
    try:
        yield
    except ServdError as error:
        await abort_with(context, error, sampling_field)
    except Exception:
        logger.exception("unexpected error in a gRPC call")
        await abort_with(context, RequestFailedError("internal error; the server's log has the details"))
