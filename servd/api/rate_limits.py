"""How much one key may ask for: requests and tokens a minute, and answers at once.

Knows nothing of keys or transports; both fronts share one object a key. Touched on the event loop alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from servd.errors import RateLimitedError
from servd.outputs import RequestOutput

CONCURRENT_RETRY_SECONDS = 1.0  # when an answer will end is not known

Clock = Callable[[], float]


class _Bucket:
    """Holds a minute's worth at most and fills evenly; may be overdrawn by what was not known beforehand."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._time = clock()

    def level(self) -> float:
        """What may be taken now; less than 0 after an overdraft."""
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._time) * self.per_minute / 60)
        self._time = now
        return self._level

    def take(self, amount: float) -> None:
        """Take, also what is not there."""
        self._level = min(float(self.per_minute), self.level() - amount)

    def seconds_until(self, level: float) -> float:
        """When so much will be there, if nothing is taken."""
        return max(0.0, (level - self.level()) * 60 / self.per_minute)

    def resize(self, per_minute: int) -> None:
        """Another limit; what was taken of the old one stays taken."""
        self._level = self.level() + per_minute - self.per_minute
        self.per_minute = per_minute


class Charge:
    """One request's account: its prompt is paid, its answers are paid as they grow, its place is given back."""

    def __init__(self, limits: Limits, num_prompt_tokens: int, num_answers: int, num_computed: int) -> None:
        self._limits = limits
        self._price = num_computed / num_answers  # of a token: best_of and beams compute more than they show
        self._num_prompt_tokens = num_prompt_tokens
        self._unfinished = num_answers

    def take(self, output: RequestOutput) -> None:
        """Pay for new tokens; the last answer's end gives the place back."""
        if output.token_ids:
            self._limits.spend(len(output.token_ids) * self._price)
        if output.finish_reason is not None:
            self._unfinished -= 1
            if self._unfinished == 0:
                self._limits.num_concurrent -= 1

    def refund(self) -> None:
        """The request was refused after all."""
        self._limits.spend(-self._num_prompt_tokens)
        self._limits.num_concurrent -= 1


class Limits:
    """A key's limits and what is used of them; None: no limit."""

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_concurrent: int | None = None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self.num_concurrent = 0  # requests being answered
        self.max_concurrent = max_concurrent
        self._clock = clock
        self._requests = None if requests_per_minute is None else _Bucket(requests_per_minute, clock)
        self._tokens = None if tokens_per_minute is None else _Bucket(tokens_per_minute, clock)

    def change(
        self, requests_per_minute: int | None, tokens_per_minute: int | None, max_concurrent: int | None
    ) -> None:
        """Other limits from now on; what is used stays used, so that editing a key gives nothing away."""
        self._requests = self._changed(self._requests, requests_per_minute)
        self._tokens = self._changed(self._tokens, tokens_per_minute)
        self.max_concurrent = max_concurrent

    def _changed(self, bucket: _Bucket | None, per_minute: int | None) -> _Bucket | None:
        if bucket is None or per_minute is None:
            return None if per_minute is None else _Bucket(per_minute, self._clock)
        bucket.resize(per_minute)
        return bucket

    def count_request(self) -> None:
        """A call has come in. Raises RateLimitedError if it is one too many; it is then not counted."""
        if self._requests is None:
            return
        if self._requests.level() < 1:
            raise RateLimitedError(
                f"this key has used its requests; allowed: {self._requests.per_minute} a minute",
                retry_after=self._requests.seconds_until(1),
            )
        self._requests.take(1)

    def begin(self, num_prompt_tokens: int, num_answers: int, num_computed: int | None = None) -> Charge:
        """Start a request, whose prompt is paid for now. Raises RateLimitedError.

        num_computed: answers or beams that are worked on, if more than are shown; they are taken to be as long.

        Tokens that an answer will have are not known yet: they may overdraw, and then nothing starts until that is
        made good. A prompt longer than a minute's worth waits for a full minute.
        """
        if self.max_concurrent is not None and self.num_concurrent >= self.max_concurrent:
            raise RateLimitedError(
                f"this key has {self.num_concurrent} requests in work; allowed: {self.max_concurrent} at once",
                retry_after=CONCURRENT_RETRY_SECONDS,
            )
        if self._tokens is not None:
            needed = min(max(num_prompt_tokens, 1), self._tokens.per_minute)
            if self._tokens.level() < needed:
                raise RateLimitedError(
                    f"this key has used its tokens; {num_prompt_tokens} are asked for, allowed: "
                    f"{self._tokens.per_minute} a minute, of which {max(0, int(self._tokens.level()))} are left",
                    retry_after=self._tokens.seconds_until(needed),
                )
        self.spend(num_prompt_tokens)
        self.num_concurrent += 1
        return Charge(self, num_prompt_tokens, num_answers, num_computed or num_answers)

    def spend(self, num_tokens: float) -> None:
        """Pay for tokens that were computed, whether there were so many left or not."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` reply headers: limit, what remains, and how long until all of it is back."""
        found = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level())))
                found[f"x-ratelimit-reset-{name}"] = f"{math.ceil(bucket.seconds_until(bucket.per_minute))}s"
        return found
