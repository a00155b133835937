"""GET /metrics: Prometheus' text format.

Knows nothing of any one metric.
"""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from servd.api.http.context import SERVICE
from servd.api.http.openapi import Endpoint, Operation


async def metrics(request: web.Request) -> web.Response:
    """All metrics of the engine."""
    return web.Response(
        body=request.app[SERVICE].engine.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )


ROUTES = [Endpoint("GET", "/metrics", metrics, Operation("Prometheus metrics", media_type="text/plain"))]
