"""First come, first served. A preempted request keeps its place."""

from __future__ import annotations

from servd.scheduler.policies import POLICIES, Policy

POLICIES.register("fcfs")(Policy(lambda request: (request.arrival_time,), uses_priority=False))
