"""Every Prometheus metric, declared once with its unit and help.

Knows nothing of who counts: the engine calls the methods, `/metrics` renders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

_DIVERGENCE = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1)


class Load(Protocol):
    """What gauges show; EngineStats has it."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_pinned(self) -> int: ...
    @property
    def kv_blocks_cached(self) -> int: ...
    @property
    def kv_blocks_free(self) -> int: ...


class Metrics:
    """The metrics of one engine, in a registry of their own (several engines can live in one process)."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests_running = Gauge("servd_requests_running", "Requests in the batch now", registry=registry)
        self.requests_waiting = Gauge("servd_requests_waiting", "Requests waiting for room", registry=registry)
        self.requests_finished = Counter(
            "servd_requests_finished", "Answers finished, by reason", ["reason"], registry=registry
        )
        self.kv_blocks = Gauge(
            "servd_kv_blocks",
            "KV blocks: used by requests, pinned (also while requests use them), cached (reusable until evicted), free",
            ["state"],
            registry=registry,
        )
        self.prefix_pins = Gauge("servd_prefix_pins", "Pinned prefixes", registry=registry)
        self.time_to_first_token = Histogram(
            "servd_time_to_first_token_seconds", "Arrival to first token", buckets=_LATENCY, registry=registry
        )
        self.inter_token_latency = Histogram(
            "servd_inter_token_latency_seconds", "Between tokens of an answer", buckets=_LATENCY, registry=registry
        )
        self.e2e_latency = Histogram(
            "servd_request_e2e_seconds", "Arrival to last token", buckets=_LATENCY, registry=registry
        )
        self.queue_time = Histogram(
            "servd_request_queue_seconds", "Arrival to first step", buckets=_LATENCY, registry=registry
        )
        self.step_time = Histogram(
            "servd_step_seconds", "Computation of one step, in the worker", buckets=_LATENCY, registry=registry
        )
        self.prompt_tokens = Counter("servd_prompt_tokens", "Prompt tokens of requests that started", registry=registry)
        self.generation_tokens = Counter("servd_generation_tokens", "Tokens generated", registry=registry)
        self.prefix_cache_queries = Counter(
            "servd_prefix_cache_queries", "Tokens looked up in the prefix cache", registry=registry
        )
        self.prefix_cache_hits = Counter(
            "servd_prefix_cache_hits", "Tokens found in the prefix cache", registry=registry
        )
        self.preemptions = Counter(
            "servd_preemptions", "Requests put back to be computed again", registry=registry
        )
        self.spec_drafted_tokens = Counter(
            "servd_spec_drafted_tokens", "Tokens guessed ahead of answers and computed", registry=registry
        )
        self.spec_accepted_tokens = Counter(
            "servd_spec_accepted_tokens", "Guessed tokens that were right", registry=registry
        )
        self.worker_restarts = Counter(
            "servd_worker_restarts", "Restarts of the model workers after a death", registry=registry
        )

        self.kv_shadow_kl = Histogram(
            "servd_kv_shadow_kl_nats",
            "Divergence of the next-token distribution from an unquantized KV cache's, in sampled steps",
            buckets=_DIVERGENCE,
            registry=registry,
        )
        self.kv_shadow_top1_equal = Counter(
            "servd_kv_shadow_top1_equal", "Sampled steps with the same likeliest token", registry=registry
        )

    def follow_gauges(self, stats: Callable[[], Load], num_pins: Callable[[], int]) -> None:
        """Read gauges at scrape time."""
        self.requests_running.set_function(lambda: stats().running)
        self.requests_waiting.set_function(lambda: stats().waiting)
        self.prefix_pins.set_function(num_pins)
        self.kv_blocks.labels("used").set_function(lambda: stats().kv_blocks_used)
        self.kv_blocks.labels("pinned").set_function(lambda: stats().kv_blocks_pinned)
        self.kv_blocks.labels("cached").set_function(lambda: stats().kv_blocks_cached)
        self.kv_blocks.labels("free").set_function(lambda: stats().kv_blocks_free)

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
