"""The fields that completions and chat completions share, and how they become SamplingParams.

Knows nothing of prompts or messages; ranges are checked by SamplingParams itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from servd.api.http.schema.answer_format import ResponseFormat, StructuredOutputs
from servd.api.http.schema.checks import (
    check_count,
    check_length,
    check_neutral,
    check_range,
    logit_bias,
    stop_strings,
    stop_token_ids,
)
from servd.errors import InvalidRequestError, UnsupportedError
from servd.sampling_params import MAX_N, SamplingParams

MAX_SALT_CHARS = 256
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_PRIORITY = 1 << 31
MAX_ALLOWED_TOKEN_IDS = 1 << 18  # no vocabulary has more
MAX_BAD_WORDS = 128


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
        "spaces_between_special_tokens": (None, False),
        "truncation_side": (None, "left"),
        "guided_decoding_backend": (None, "auto"),
        "guided_whitespace_pattern": (None,),
        "return_tokens_as_token_ids": (None, False),
        "logprob_token_ids": (None,),
        "logits_processors": (None, []),
        "repetition_detection": (None,),
        "thinking_token_budget": (None, -1),
        "stream_interval": (None, 1),
        "watermarking": (None, False),
        "kv_transfer_params": (None,),
        "ec_transfer_params": (None,),
        "vllm_xargs": (None, {}),
        "request_id": (None,),
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
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = None  # the last ones are kept; -1: as many as the context has room for
    # several answers, of which the best are returned
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    # the form of the answer: one of these
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
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
    session_id: str | None = None
    # refused unless neutral
    service_tier: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    spaces_between_special_tokens: Any = None
    truncation_side: Any = None
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None
    return_tokens_as_token_ids: Any = None
    logprob_token_ids: Any = None
    logits_processors: Any = None
    repetition_detection: Any = None
    thinking_token_budget: Any = None
    stream_interval: Any = None
    watermarking: Any = None
    kv_transfer_params: Any = None
    ec_transfer_params: Any = None
    vllm_xargs: Any = None
    request_id: Any = None

    def check(self) -> None:
        """Raise UnsupportedError or InvalidRequestError for what no SamplingParams would notice."""
        check_neutral("", {name: getattr(self, name) for name in self.NEUTRAL}, self.NEUTRAL)
        if self.stream_options is not None:
            if not self.stream:
                raise InvalidRequestError("stream_options is set; allowed: with stream: true", param="stream_options")
            if self.stream_options.include_obfuscation:
                raise UnsupportedError(
                    "stream_options.include_obfuscation is true; allowed: false", param="stream_options"
                )
        if self.cache_salt is not None:
            check_length("cache_salt", self.cache_salt, 1, MAX_SALT_CHARS, "characters")
        if self.deadline_ms is not None:
            check_range("deadline_ms", self.deadline_ms, 1, MAX_DEADLINE_MS)
        check_range("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.n is not None:
            check_range("n", self.n, 1, MAX_N)
        if self.best_of is not None:
            check_range("best_of", self.best_of, self.n or 1, MAX_N)
            if self.stream and not self.use_beam_search and self.best_of != (self.n or 1):
                raise InvalidRequestError(
                    f"best_of is {self.best_of}; allowed with stream: true: n ({self.n or 1}), for which is best is "
                    "known at the end",
                    param="best_of",
                )
        if self.truncate_prompt_tokens not in (None, -1):
            check_range("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, 1 << 31)
        for name, high in (("allowed_token_ids", MAX_ALLOWED_TOKEN_IDS), ("bad_words", MAX_BAD_WORDS)):
            check_count(name, getattr(self, name) or (), high)

    @property
    def num_sequences(self) -> int:
        """Answers written for each prompt."""
        return self.best_of or self.n or 1

    def sampling_params(
        self,
        vocab_size: int,
        defaults: Mapping[str, float],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        guidance: str | None = None,
    ) -> SamplingParams:
        """The checked settings; `defaults` are the model's own. Raises InvalidRequestError naming the field.

        A beam search does not sample: the model's defaults are not for it.
        """
        given: dict[str, Any] = {} if self.use_beam_search else {**defaults}
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
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_words=tuple(self.bad_words or ()),
            guidance=guidance,
            **given,
        )
        params.validate(vocab_size)
        return params


_PASSED_ON = (
    "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
    "best_of", "use_beam_search", "length_penalty", "early_stopping",
)  # fmt: skip
