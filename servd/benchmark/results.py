"""What one run of a load gave: a row a request, and the figures that are made of rows.

Knows nothing of how rows are measured. All of it is msgspec structs, so that a file of results is read back checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from servd.errors import ConfigError

PERCENTILES = (50, 90, 99)


class RequestRow(msgspec.Struct, kw_only=True):
    """One request as the client saw it. Times are in milliseconds since it was due: sent, or, in an open loop, planned.

    `itl_ms` are the gaps between pieces of text as they came; a piece may hold several tokens.
    """

    id: str
    start_s: float  # since the run's start: when it was due
    prompt_tokens: int = 0
    output_tokens: int = 0  # by the server's usage; pieces counted where it sends none
    asked_tokens: int = 0
    ttft_ms: float | None = None
    e2e_ms: float = 0.0
    itl_ms: list[float] = []
    has_usage: bool = False
    error: str | None = None  # its kind: "refused", "broken", "timeout", "http 429", "event", ...
    message: str | None = None  # what the server said

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds per token after the first; None for an answer of one token."""
        return sum(self.itl_ms) / (self.output_tokens - 1) if self.output_tokens > 1 and self.itl_ms else None


class Percentiles(msgspec.Struct, kw_only=True, frozen=True):
    """Of one figure over requests (or gaps); NaN-free: None where there is nothing."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Linear between ranks."""
        if not len(values):
            return cls(mean=None, p50=None, p90=None, p99=None)
        p50, p90, p99 = (round(float(p), 3) for p in np.percentile(values, PERCENTILES))
        return cls(mean=round(float(np.mean(values)), 3), p50=p50, p90=p90, p99=p99)


class SLO(msgspec.Struct, kw_only=True, frozen=True):
    """Limits in milliseconds that a good answer keeps; None does not matter."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> SLO:
        """`ttft=500,tpot=50,e2e=9000`, any of them. Raises ConfigError."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            try:
                limits[name.strip()] = float(value)
            except ValueError:
                limits[part] = 0.0
        if not set(limits) <= set(cls.__struct_fields__) or not all(limit > 0 for limit in limits.values()):
            raise ConfigError(f"--slo is {text!r}; allowed: ttft=MS,tpot=MS,e2e=MS, or some of them")
        return cls(**limits)

    def is_met(self, row: RequestRow) -> bool:
        """Whether the request succeeded within the limits."""
        if row.error is not None:
            return False
        times = ((self.ttft, row.ttft_ms), (self.tpot, row.tpot_ms), (self.e2e, row.e2e_ms))
        return all(limit is None or time is None or time <= limit for limit, time in times)

    def __str__(self) -> str:
        limits = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits if limit is not None)


class Summary(msgspec.Struct, kw_only=True, frozen=True):
    """The figures of a run. Rates are per second from the first request's start to the last one's end."""

    completed: int
    failed: int
    errors: dict[str, int]
    short: int  # answers with fewer or more tokens than asked
    without_usage: int  # answers whose tokens had to be counted by pieces
    wall_s: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_per_s: float | None  # requests within the SLO
    good_share: float | None  # of all requests, failed ones included
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    itl_ms: Percentiles
    e2e_ms: Percentiles


class RunResult(msgspec.Struct, kw_only=True):
    """One repetition at one level of load."""

    load: str  # "c=8", "4 req/s", "trace": equal names are compared with each other
    repetition: int = 0
    salt: int  # of the fresh first tokens
    started_at: str  # ISO 8601, UTC
    wall_s: float
    client_cpu_s: float  # that this process used meanwhile: it is taken from a server on the same cores
    max_send_delay_ms: float = 0.0  # open loop: how late the latest request left
    rows: list[RequestRow]

    def summary(self, slo: SLO | None = None) -> Summary:
        """The figures. Failed requests count in `failed` and `good_share` alone."""
        good = [row for row in self.rows if row.error is None]
        prompt_tokens = sum(row.prompt_tokens for row in good)
        output_tokens = sum(row.output_tokens for row in good)
        wall = self.wall_s or float("inf")
        num_met = sum(map(slo.is_met, self.rows)) if slo is not None else None
        return Summary(
            completed=len(good),
            failed=len(self.rows) - len(good),
            errors=dict(Counter(row.error for row in self.rows if row.error is not None).most_common()),
            short=sum(row.output_tokens != row.asked_tokens for row in good),
            without_usage=sum(not row.has_usage for row in good),
            wall_s=round(self.wall_s, 3),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            requests_per_s=round(len(good) / wall, 3),
            output_tokens_per_s=round(output_tokens / wall, 2),
            total_tokens_per_s=round((prompt_tokens + output_tokens) / wall, 2),
            goodput_per_s=None if num_met is None else round(num_met / wall, 3),
            good_share=None if num_met is None else round(num_met / max(len(self.rows), 1), 4),
            ttft_ms=Percentiles.of([row.ttft_ms for row in good if row.ttft_ms is not None]),
            tpot_ms=Percentiles.of([tpot for row in good if (tpot := row.tpot_ms) is not None]),
            itl_ms=Percentiles.of([gap for row in good for gap in row.itl_ms]),
            e2e_ms=Percentiles.of([row.e2e_ms for row in good]),
        )
