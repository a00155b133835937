"""GET /, and /web/{name}: the playground and the files of all pages.

Knows nothing of what they show: they ask the API like any client.
"""

from __future__ import annotations

from aiohttp import web

from servd.api.http.assets import send_asset
from servd.api.http.openapi import Endpoint, Operation


async def playground(request: web.Request) -> web.Response:
    """The playground's page."""
    return send_asset(request, "index.html")


async def web_file(request: web.Request) -> web.Response:
    """A script, style or image of the pages."""
    return send_asset(request, request.match_info["name"])


ROUTES = [
    Endpoint("GET", "/", playground, Operation("The playground", public=True, hidden=True)),
    Endpoint("GET", "/web/{name}", web_file, Operation("A file of the pages", public=True, hidden=True)),
]
