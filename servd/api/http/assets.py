"""The files of the pages at / and /docs: read once from the package, sent with an ETag and a strict policy.

Knows nothing of what is in them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from aiohttp import web

from servd.api.http.errors import UnknownPathError

# Nothing from elsewhere, nothing inline, no frames around or within, no form that leaves: what a model writes can at
# most be shown.
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_CONTENT_TYPES: Final = {
    "html": "text/html",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent."""

    data: bytes
    content_type: str
    etag: str


@cache
def _assets() -> dict[str, Asset]:
    found: dict[str, Asset] = {}
    for path in files("servd.api.http.web").iterdir():
        content_type = _CONTENT_TYPES.get(path.name.rpartition(".")[2])
        if content_type is not None:
            data = path.read_bytes()
            found[path.name] = Asset(data, content_type, hashlib.sha256(data).hexdigest()[:16])
    return found


def asset_names() -> list[str]:
    """Names of all files there are."""
    return sorted(_assets())


def send_asset(request: web.Request, name: str) -> web.Response:
    """The file, or 304 to who has it. Names are looked up, never opened. Raises UnknownPathError."""
    asset = _assets().get(name)
    if asset is None:
        raise UnknownPathError("this server has no such file")
    response = send_cached(request, asset.data, asset.content_type, asset.etag)
    response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def send_cached(request: web.Request, data: bytes, content_type: str, etag: str) -> web.Response:
    """`data`, or 304 if the client has this ETag; it must ask again each time."""
    known = request.if_none_match or ()
    if any(tag.value in (etag, "*") for tag in known):
        response = web.Response(status=304)
    else:
        charset = "utf-8" if content_type.startswith("text/") else None
        response = web.Response(body=data, content_type=content_type, charset=charset)
    response.etag = etag
    response.headers["Cache-Control"] = "no-cache"
    return response
