"""GET /openapi.json: what this server can be asked, for programs; and /docs, the same for people, with no internet.

Knows nothing of any one endpoint.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from servd.api.http.assets import send_asset, send_cached
from servd.api.http.openapi import API_DOCUMENT, Endpoint, Operation


async def openapi_document(request: web.Request) -> web.Response:
    """The OpenAPI 3.1 document, made of the types that parse the requests."""
    document = request.app[API_DOCUMENT]
    return send_cached(request, document.json, "application/json", document.etag)


async def docs_page(request: web.Request) -> web.Response:
    """The page that shows /openapi.json; it holds no data itself."""
    return send_asset(request, "docs.html")


ROUTES = [
    Endpoint("GET", "/openapi.json", openapi_document, Operation("This document", reply=dict[str, Any])),
    Endpoint("GET", "/docs", docs_page, Operation("The API, for people", public=True, hidden=True)),
]
