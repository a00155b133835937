"""Smaller `priority` first, then arrival. The least important running request is preempted first."""

from __future__ import annotations

from servd.scheduler.policies import POLICIES, Policy

POLICIES.register("priority")(
    Policy(lambda request: (request.priority, request.arrival_time), uses_priority=True)
)
