"""Every error a caller can meet, each with its HTTP status and gRPC code.

Knows nothing of transports: `api/` turns `http_status` and `grpc_code` into replies in one place.

    ServdError                       500 INTERNAL
    ├── InvalidRequestError          400 INVALID_ARGUMENT     names the field and what is allowed
    │   └── UnsupportedError         400 UNIMPLEMENTED        a known field that servd does not honour
    ├── AuthenticationError          401 UNAUTHENTICATED
    ├── NotFoundError                404 NOT_FOUND            unknown model, unknown request
    ├── PayloadTooLargeError         413 RESOURCE_EXHAUSTED
    ├── OverloadedError              429 RESOURCE_EXHAUSTED   carries retry_after seconds
    │   └── RateLimitedError         429 RESOURCE_EXHAUSTED   this key has used what it may
    ├── DeadlineExceededError        408 DEADLINE_EXCEEDED
    ├── RequestFailedError           500 INTERNAL             this one request failed, the engine goes on
    │   └── StepFailedError          500 INTERNAL             a whole step failed; the workers live on
    ├── EngineUnavailableError       503 UNAVAILABLE          starting, draining or dead
    ├── ConfigError                  (never leaves start-up)  a flag or a model folder is wrong
    └── WorkerDied                   503 UNAVAILABLE          a model worker process is gone
"""

from __future__ import annotations

from typing import ClassVar


class ServdError(Exception):
    """Base of all errors raised on purpose. `param` names the offending field, if one is to blame."""

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(ServdError):
    """The request itself is wrong; sending it again unchanged fails again."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedError(InvalidRequestError):
    """The field is known, but servd does not honour it: said aloud rather than ignored."""

    grpc_code = "UNIMPLEMENTED"
    code = "unsupported_parameter"


class AuthenticationError(ServdError):
    """No API key, or not one of the configured ones."""

    http_status = 401
    grpc_code = "UNAUTHENTICATED"
    type = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(ServdError):
    """The named model or object does not exist here."""

    http_status = 404
    grpc_code = "NOT_FOUND"
    type = "invalid_request_error"
    code = "model_not_found"


class PayloadTooLargeError(ServdError):
    """The body is larger than the configured limit."""

    http_status = 413
    grpc_code = "RESOURCE_EXHAUSTED"
    type = "invalid_request_error"
    code = "payload_too_large"


class OverloadedError(ServdError):
    """The waiting queue is full; nothing was started. Try again after `retry_after` seconds."""

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    type = "overloaded_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimitedError(OverloadedError):
    """The caller's key has used what it may; nothing was started."""

    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class DeadlineExceededError(ServdError):
    """The caller's deadline passed before the answer was complete."""

    http_status = 408
    grpc_code = "DEADLINE_EXCEEDED"
    type = "timeout_error"
    code = "deadline_exceeded"


class RequestFailedError(ServdError):
    """This request could not be computed; others are not affected."""

    code = "request_failed"


class StepFailedError(RequestFailedError):
    """A step raised in the worker and gave no result; the worker goes on with the next one."""

    code = "step_failed"


class EngineUnavailableError(ServdError):
    """The engine does not take requests now: it starts, drains, or has failed for good."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    type = "unavailable_error"
    code = "engine_unavailable"


class ConfigError(ServdError):
    """A flag, a file or a model folder given at start-up is wrong; printed as one line."""

    code = "config_error"


class WorkerDied(EngineUnavailableError):
    """A model worker process ended without being asked to."""

    code = "worker_died"
