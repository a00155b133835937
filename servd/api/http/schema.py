"""The bodies of the generating endpoints, field by field: honoured, without effect, or refused by name.

Turns a body into SamplingParams. Knows nothing of tokens or engines; ranges are checked by SamplingParams itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import msgspec

from servd.api.http.messages import ChatMessage
from servd.errors import InvalidRequestError, UnsupportedError
from servd.sampling_params import (
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

MAX_PROMPTS = 256
MAX_CHOICES = 1024  # prompts times n
MAX_SALT_CHARS = 256
MAX_DEADLINE_MS = 24 * 3600 * 1000
MAX_PRIORITY = 1 << 31

Scalar = str | int | float | bool | None

# What a template's caller may not override: the names that the renderer itself sets.
_RESERVED_TEMPLATE_NAMES = frozenset(
    ("messages", "tools", "documents", "tokenize", "chat_template", "add_generation_prompt", "continue_final_message",
     "bos_token", "eos_token", "raise_exception", "strftime_now", "conversation", "return_dict", "tokenizer")
)  # fmt: skip


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`stream_options`: whether usage comes in a last chunk, or (vLLM's) in each."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


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
                    f"{field} is {_shown(value)}; servd does not honour it; allowed: "
                    f"{' or '.join(_shown(known) for known in neutral)}",
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
            _check_length("cache_salt", self.cache_salt, 1, MAX_SALT_CHARS, "characters")
        if self.deadline_ms is not None:
            _check_range("deadline_ms", self.deadline_ms, 1, MAX_DEADLINE_MS)
        _check_range("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.n is not None:
            _check_range("n", self.n, 1, MAX_N)

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
            logit_bias=_logit_bias(self.logit_bias),
            stop=_stop_strings(self.stop),
            stop_token_ids=_stop_token_ids(self.stop_token_ids),
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


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/completions."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = GenerationRequest.NEUTRAL | {
        "suffix": (None, ""),
        "response_format": (None, {"type": "text"}),
    }

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool = True
    suffix: Any = None
    response_format: Any = None

    def check(self) -> None:
        """See GenerationRequest.check."""
        GenerationRequest.check(self)
        if self.best_of not in (None, self.n or 1):
            raise UnsupportedError(f"best_of is {self.best_of}; allowed: n ({self.n or 1})", param="best_of")

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many. Raises InvalidRequestError for an empty, mixed or overlong list."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise InvalidRequestError("prompt is an empty list; allowed: at least one prompt or token", param="prompt")
        kinds = set(map(type, prompt))
        if len(kinds) > 1:
            raise InvalidRequestError(
                "prompt is a list of mixed kinds; allowed: all strings, all token ids, or all lists of token ids",
                param="prompt",
            )
        if kinds == {int}:
            return [prompt]  # type: ignore[list-item]  # all of them are ints
        if len(prompt) > MAX_PROMPTS:
            raise InvalidRequestError(f"prompt has {len(prompt)} prompts; allowed: {MAX_PROMPTS}", param="prompt")
        if len(prompt) * (self.n or 1) > MAX_CHOICES:
            raise InvalidRequestError(
                f"n is {self.n} for {len(prompt)} prompts; allowed: together at most {MAX_CHOICES} answers", param="n"
            )
        return prompt  # type: ignore[return-value]  # no ints among them

    def to_sampling_params(self, vocab_size: int, defaults: Mapping[str, float]) -> SamplingParams:
        """Sampling settings; 16 tokens unless asked for more, as OpenAI has it.

        With `echo`, the prompt's tokens need log-probabilities like the answer's.
        """
        wanted = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            wanted = max(self.logprobs, wanted or 0)
        return self.sampling_params(
            vocab_size,
            defaults,
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=wanted,
        )


class ChatCompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/chat/completions."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = GenerationRequest.NEUTRAL | {
        "tools": (None, []),
        "tool_choice": (None, "none"),
        "functions": (None, []),
        "function_call": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "moderation": (None,),
        "store": (None, False),
        "web_search_options": (None,),
        "reasoning_effort": (None, "none"),
        "verbosity": (None, "medium"),
        "chat_template": (None,),
        "documents": (None, []),
        "continue_final_message": (None, False),
        "echo": (None, False),
        "add_special_tokens": (None, False),
    }

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Scalar] | None = None
    parallel_tool_calls: bool | None = None  # no effect: there are no tools
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    moderation: Any = None
    store: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    chat_template: Any = None
    documents: Any = None
    continue_final_message: Any = None
    echo: Any = None
    add_special_tokens: Any = None

    def check(self) -> None:
        """See GenerationRequest.check."""
        GenerationRequest.check(self)
        if self.top_logprobs is not None:
            _check_range("top_logprobs", self.top_logprobs, 0, MAX_LOGPROBS)
            if not self.logprobs:
                raise InvalidRequestError("top_logprobs is set; allowed only with logprobs: true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidRequestError(
                f"max_completion_tokens is {self.max_completion_tokens}; allowed: the same as max_tokens "
                f"({self.max_tokens}), or one of the two",
                param="max_completion_tokens",
            )
        for name in self.chat_template_kwargs or ():
            if name in _RESERVED_TEMPLATE_NAMES:
                raise InvalidRequestError(
                    f"chat_template_kwargs holds {name!r}, which the server sets itself", param="chat_template_kwargs"
                )

    @property
    def max_tokens_field(self) -> str:
        """Which of its two names the client used for the length of the answer."""
        return "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"

    def to_sampling_params(self, vocab_size: int, defaults: Mapping[str, float]) -> SamplingParams:
        """Sampling settings; the answer may fill the context unless told otherwise."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        with renamed("max_tokens", self.max_tokens_field):
            return self.sampling_params(
                vocab_size,
                defaults,
                max_tokens=max_tokens,
                logprobs=logprobs,
                prompt_logprobs=self.prompt_logprobs,
            )


@contextmanager
def renamed(name: str, client_name: str) -> Iterator[None]:
    """Errors about `name` speak of the field as the client called it."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param != name or name == client_name:
            raise
        raise InvalidRequestError(error.message.replace(name, client_name, 1), param=client_name) from None


def _logit_bias(biases: dict[str, float] | None) -> dict[int, float] | None:
    if biases is None:
        return None
    _check_count("logit_bias", biases, MAX_LOGIT_BIASES)
    for key in biases:
        if not (key.isascii() and key.removeprefix("-").isdigit() and len(key) <= 20):
            raise InvalidRequestError(
                f"logit_bias has the key {key[:100]!r}; allowed: token ids written as decimal numbers",
                param="logit_bias",
            )
    return {int(key): bias for key, bias in biases.items()}


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in stops[:64]:  # more than that is refused for its number
        _check_length("stop", text, 0, MAX_STOP_CHARS, "characters in a string")
    return stops


def _stop_token_ids(token_ids: list[int] | None) -> tuple[int, ...]:
    _check_count("stop_token_ids", token_ids or (), MAX_STOP_TOKEN_IDS)
    return tuple(token_ids or ())


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequestError(f"{field} is {value}; allowed: {low} to {high}", param=field)


def _check_length(field: str, value: str, low: int, high: int, unit: str) -> None:
    if not low <= len(value) <= high:
        raise InvalidRequestError(f"{field} has {len(value)} {unit}; allowed: {low} to {high}", param=field)


def _check_count(field: str, values: Any, high: int) -> None:
    if len(values) > high:
        raise InvalidRequestError(f"{field} has {len(values)} entries; allowed: at most {high}", param=field)


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
