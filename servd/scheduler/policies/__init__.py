"""Scheduling policies: each file registers one, an order of requests, the smallest key first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from servd.registry import Registry
from servd.request import Request


@dataclass(frozen=True, slots=True)
class Policy:
    """An order of requests.

    `key` must not change while the request lives, and must be unique enough that preempting the last request and
    admitting the first one cannot alternate for ever. With `uses_priority` false, a request that sets a priority is
    refused rather than its priority ignored.
    """

    key: Callable[[Request], tuple[Any, ...]]
    uses_priority: bool


POLICIES: Registry[Policy] = Registry("scheduling policy", __name__)
