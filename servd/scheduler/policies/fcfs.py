"""First come, first served. A preempted request keeps its place."""

from __future__ import annotations

from servd.request import Request
from servd.scheduler.policies import POLICIES


@POLICIES.register("fcfs")
def fcfs(request: Request) -> tuple[float]:
    """Order by arrival."""
    return (request.arrival_time,)
