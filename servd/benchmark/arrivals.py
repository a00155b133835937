"""When requests of an open loop arrive: a Poisson process, or gamma gaps for more or less bursty traffic.

Knows nothing of requests' contents.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from servd.benchmark.requests import BenchRequest


def arrive_at_rate(
    requests: Sequence[BenchRequest], rate: float, *, burstiness: float = 1.0, seed: int = 0
) -> list[BenchRequest]:
    """The requests with arrivals of `rate` a second on average; the first comes at once.

    Gaps are gamma distributed with shape `burstiness`: 1 is a Poisson process, below 1 comes in bursts, above 1 more
    evenly.
    """
    rng = random.Random(f"arrivals {seed}")
    arrival = 0.0
    arriving: list[BenchRequest] = []
    for request in requests:
        arriving.append(dataclasses.replace(request, arrival_s=arrival))
        arrival += rng.gammavariate(burstiness, 1 / (rate * burstiness))
    return arriving
