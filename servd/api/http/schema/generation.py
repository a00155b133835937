"""The fields that completions and chat completions share, and how they become SamplingParams.

Knows nothing of prompts or messages; ranges are checked by SamplingParams itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from servd.api.http.schema.checks import (
    check_length,
    check_range,
    logit_bias,
    shown,
    stop_strings,
    stop_token_ids,
)
from servd.errors import InvalidRequestError, UnsupportedError
from servd.sampling_params import MAX_N, SamplingParams

MAX_SALT_CHARS = 256
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_PRIORITY = 1 << 31


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`stream_options`: whether usage comes in a last chunk, or (vLLM's) in each."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False
    resumable: bool = False  # servd: goes on for a while without its client (see event_stream)


class GenerationRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that completions and chat completions share."""

    # Fields that are refused unless they hold one of these values, which change nothing.
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "service_tier": (None, "auto", "default"),
        "prompt_cache_retention": (None, "in_memory"),
        "prompt_cache_options": (None, {}),
    }

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # sampling, OpenAI's
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    # sampling, vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = None
    # scheduling and form of the reply
    priority: int = 0
    cache_salt: str | None = None
    deadline_ms: int | None = None  # servd's: the whole request, from arrival, in milliseconds
    return_token_ids: bool | None = None
    # bookkeeping for OpenAI's dashboards and caches: no effect here
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # refused unless neutral
    service_tier: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    def check(self) -> None:
        """Raise UnsupportedError or InvalidRequestError for what no SamplingParams would notice."""
        for field, neutral in self.NEUTRAL.items():
            value = getattr(self, field)
            if not any(value == known and type(value) is type(known) for known in neutral):
                raise UnsupportedError(
                    f"{field} is {shown(value)}; servd does not honour it; allowed: "
                    f"{' or '.join(shown(known) for known in neutral)}",
                    param=field,
                )
        if self.stream_options is not None:
            if not self.stream:
                raise InvalidRequestError("stream_options is set; allowed: with stream: true", param="stream_options")
            if self.stream_options.include_obfuscation:
                raise UnsupportedError(
                    "stream_options.include_obfuscation is true; allowed: false", param="stream_options"
                )
        if self.stream and self.prompt_logprobs is not None:
            raise UnsupportedError("prompt_logprobs is set; allowed only with stream: false", param="prompt_logprobs")
        if self.cache_salt is not None:
            check_length("cache_salt", self.cache_salt, 1, MAX_SALT_CHARS, "characters")
        if self.deadline_ms is not None:
            check_range("deadline_ms", self.deadline_ms, 1, MAX_DEADLINE_MS)
        check_range("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.n is not None:
            check_range("n", self.n, 1, MAX_N)

    def sampling_params(
        self,
        vocab_size: int,
        defaults: Mapping[str, float],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """The checked settings; `defaults` are the model's own. Raises InvalidRequestError naming the field."""
        given: dict[str, Any] = {**defaults}
        given |= {name: value for name in _PASSED_ON if (value := getattr(self, name)) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0  # vLLM's -1 also keeps all
        params = SamplingParams(
            max_tokens=max_tokens,
            logit_bias=logit_bias(self.logit_bias),
            stop=stop_strings(self.stop),
            stop_token_ids=stop_token_ids(self.stop_token_ids),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **given,
        )
        params.validate(vocab_size)
        return params


_PASSED_ON = (
    "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip
