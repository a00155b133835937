"""The body of /v1/completions, field by field.

Knows nothing of tokens or engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from servd.api.http.schema.generation import GenerationRequest
from servd.errors import InvalidRequestError, UnsupportedError
from servd.sampling_params import SamplingParams

MAX_PROMPTS = 256
MAX_CHOICES = 1024  # prompts times n


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
