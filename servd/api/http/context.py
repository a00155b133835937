"""What handlers find on the application and on a request, under typed keys.

Knows nothing of what the values do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from aiohttp import web

from servd import __version__
from servd.api.access import Caller, KeyRing
from servd.api.http.responses.store import ResponseStore
from servd.api.http.resumable_streams import ResumableStreams
from servd.api.service import InferenceService
from servd.config import ServerConfig
from servd.engine.observer import EngineFeed
from servd.errors import ServdError

ErrorBody = Callable[[ServdError, str], bytes]
"""(the error, the request's id) → the body of the reply that tells of it."""

SERVICE = web.AppKey("service", InferenceService)
SERVER_CONFIG = web.AppKey("server_config", ServerConfig)
KEYS = web.AppKey("keys", KeyRing)
PUBLIC_ROUTES = web.AppKey("public_routes", frozenset[str])  # canonical paths of resources that need no key
ENGINE_FEED = web.AppKey("engine_feed", EngineFeed)
WRITE_TIMEOUT = web.AppKey("write_timeout", float)  # seconds that a client may leave its replies unread
KEEP_ALIVE = web.AppKey("keep_alive", float)  # seconds without an event before a comment is sent; 0: none
RESUMABLE_STREAMS = web.AppKey("resumable_streams", ResumableStreams)
RESPONSES = web.AppKey("responses", ResponseStore)
ERROR_BODIES: web.AppKey[dict[str, ErrorBody]] = web.AppKey("error_bodies", dict)  # by path prefix: dialects' shapes
BODY_TIMEOUT = web.AppKey("body_timeout", float)  # seconds that a body may take to arrive
REQUEST_ID = web.RequestKey("request_id", str)
ARRIVAL = web.RequestKey("arrival", float)  # time.monotonic() seconds
CALLER = web.RequestKey("caller", Caller)


def system_fingerprint(service: InferenceService) -> str:
    """Changes when the version or the model does: what OpenAI calls the backend configuration."""
    identity = f"{__version__}\0{service.model_name}"
    return f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
