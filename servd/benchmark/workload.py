"""Requests made from a seed: lengths like a chat service's, or a prefix that they share.

Knows nothing of arrivals (servd.benchmark.arrivals), traces (servd.benchmark.trace) or files (servd.benchmark.dataset).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from servd.benchmark.corpus import Corpus, join
from servd.benchmark.requests import BenchRequest
from servd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens: log-normal if `sigma` is set, else normal with `std`; then clipped."""

    center: float  # the median of a log-normal, the mean of a normal
    sigma: float = 0.0  # of the logarithm
    std: float = 0.0
    low: int = 1
    high: int = 1 << 20

    @classmethod
    def parse(cls, text: str, flag: str) -> Lengths:
        """`N` or `MEAN:STD`. Raises ConfigError that names the flag."""
        mean, _, std = text.partition(":")
        try:
            lengths = cls(center=float(mean), std=float(std or 0))
        except ValueError:
            lengths = cls(center=0)
        if not (1 <= lengths.center <= lengths.high and 0 <= lengths.std <= lengths.high):
            raise ConfigError(f"{flag} is {text!r}; allowed: N or MEAN:STD tokens, at least 1")
        return lengths

    def __str__(self) -> str:
        if self.sigma:
            return f"log-normal {self.low}–{self.high}, median {self.center:g}"
        return f"{self.center:g} ± {self.std:g}" if self.std else f"{self.center:g}"

    def draw(self, rng: random.Random) -> int:
        """One length."""
        if self.sigma:
            value = self.center * math.exp(rng.gauss(0, self.sigma))
        else:
            value = rng.gauss(self.center, self.std) if self.std else self.center
        return min(max(round(value), self.low), self.high)


# Medians and spreads of what people type to assistants and get back; short enough for a model of 2 K context.
CHAT_INPUT = Lengths(center=128, sigma=0.6, low=32, high=512)
CHAT_OUTPUT = Lengths(center=96, sigma=0.5, low=32, high=256)
# A system prompt that all share, a short question, a short answer.
PREFIX_INPUT = Lengths(center=32, std=8, low=16, high=48)
PREFIX_OUTPUT = Lengths(center=32)
PREFIX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """All that decides a made workload; the same spec over the same corpus gives the same requests."""

    num_requests: int = 64
    seed: int = 0
    input_tokens: Lengths = CHAT_INPUT  # without the shared prefix
    output_tokens: Lengths = CHAT_OUTPUT
    prefix_tokens: int = 0  # that requests share
    num_prefixes: int = 1  # different prefixes, taken in turn

    @classmethod
    def shared_prefix(cls, num_requests: int = 32, seed: int = 0) -> WorkloadSpec:
        """Requests with one long prefix in common: what a prefix cache is for."""
        return cls(num_requests, seed, PREFIX_INPUT, PREFIX_OUTPUT, PREFIX_TOKENS)

    def describe(self) -> str:
        """In words, lengths in tokens."""
        text = f"{self.num_requests} prompts of {self.input_tokens}, answers of {self.output_tokens} tokens"
        if self.prefix_tokens:
            text += f", after {self.num_prefixes} shared prefixes of {self.prefix_tokens}"
        return text


def make_workload(corpus: Corpus, spec: WorkloadSpec) -> list[BenchRequest]:
    """`spec.num_requests` requests, cut from the corpus."""
    rng = random.Random(f"workload {spec.seed}")
    places = len(corpus.pieces)
    shares = spec.prefix_tokens > 0
    prefixes = [corpus.stretch(rng.randrange(places), spec.prefix_tokens) for _ in range(spec.num_prefixes)]
    requests: list[BenchRequest] = []
    for i in range(spec.num_requests):
        num_own_tokens = spec.input_tokens.draw(rng)
        own = corpus.stretch(rng.randrange(places), num_own_tokens)
        prefix = i % spec.num_prefixes
        requests.append(
            BenchRequest(
                id=f"r{i}",
                prompt=join(prefixes[prefix], own) if shares else join(own),
                num_prompt_tokens=spec.prefix_tokens + num_own_tokens,
                output_tokens=spec.output_tokens.draw(rng),
                group=f"prefix {prefix}" if shares else "",
            )
        )
    return requests
