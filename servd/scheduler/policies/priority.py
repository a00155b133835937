"""Smaller `priority` first, then arrival. The least important running request is preempted first."""

from __future__ import annotations

from servd.request import Request
from servd.scheduler.policies import POLICIES


@POLICIES.register("priority")
def priority(request: Request) -> tuple[int, float]:
    """Order by the client's priority, then by arrival."""
    return (request.priority, request.arrival_time)
