"""Which web pages may call from a browser: none, but those that `--cors-origin` names.

Never allows credentials: a key is sent by the page itself, and there are no cookies.
"""

from __future__ import annotations

import re
from functools import lru_cache

from aiohttp import web

from servd.api.http.context import SERVER_CONFIG
from servd.errors import ConfigError

ALLOWED_METHODS = "GET, POST, DELETE"
PREFLIGHT_SECONDS = 600  # what the browser may remember
_ORIGIN = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9, _-]{0,1000}")
_EXPOSED = "X-Request-Id, Retry-After, " + ", ".join(
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)


@lru_cache(maxsize=8)
def parse_origins(text: str) -> frozenset[str]:
    """'https://a.example,http://b.example:3000' to origins; '*' stands for all. Raises ConfigError."""
    origins = frozenset(part.strip().rstrip("/").lower() for part in text.split(",") if part.strip())
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--cors-origin is {text!r}; allowed: * or origins with commas between, like https://a.example:8443"
            )
    return origins


def is_named(origin: str | None, allowed: str) -> bool:
    """Whether the browser page's origin is one of `--cors-origin`."""
    if origin is None or not allowed:
        return False
    origins = parse_origins(allowed)
    return origin.lower() in origins or "*" in origins


def preflight(request: web.Request, allowed: str) -> web.Response | None:
    """The answer to a browser that asks whether a page may call; None for any other request."""
    if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
        return None
    if not is_named(request.headers.get("Origin"), allowed):
        return None
    response = web.Response(status=204)
    response.headers["Access-Control-Allow-Methods"] = ALLOWED_METHODS
    asked = request.headers.get("Access-Control-Request-Headers", "")
    if _HEADER_NAMES.fullmatch(asked):  # clients send dozens of their own (x-stainless-…): all are harmless
        response.headers["Access-Control-Allow-Headers"] = asked
    response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
    return response


def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Let the browser show the reply to a page that is named."""
    allowed = request.app[SERVER_CONFIG].cors_origin
    if not allowed:
        return
    response.headers.add("Vary", "Origin")
    origin = request.headers.get("Origin")
    if origin is not None and is_named(origin, allowed):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
