"""Scheduling policies: each file registers a key by which requests are ordered, the smallest first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from servd.registry import Registry
from servd.request import Request

# A policy maps a request to its sort key. The key must not change while the request lives, and must be unique
# enough that preempting the last request and admitting the first one cannot alternate for ever.
PolicyKey = Callable[[Request], tuple[Any, ...]]

POLICIES: Registry[PolicyKey] = Registry("scheduling policy", __name__)
