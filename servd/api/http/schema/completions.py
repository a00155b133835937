"""The body of /v1/completions, field by field.

Knows nothing of tokens or engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from servd.api.chat.tools import format_text
from servd.api.http.schema.answer_format import answer_format
from servd.api.http.schema.checks import one_or_many, renamed
from servd.api.http.schema.generation import GenerationRequest
from servd.errors import InvalidRequestError
from servd.sampling_params import SamplingParams

MAX_CHOICES = 1024  # prompts times n


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/completions."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = GenerationRequest.NEUTRAL | {
        "suffix": (None, ""),
        "prompt_embeds": (None,),
        "routed_experts_prompt_start": (None, 0),
        "return_token_offsets": (None, False),
        "return_mm_kwargs": (None, True),
    }

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True
    suffix: Any = None
    prompt_embeds: Any = None
    routed_experts_prompt_start: Any = None
    return_token_offsets: Any = None
    return_mm_kwargs: Any = None

    @property
    def max_answer_tokens(self) -> int:
        """16 unless asked for more, as OpenAI has it."""
        return 16 if self.max_tokens is None else self.max_tokens

    def prompts(self, max_prompts: int) -> list[str | list[int]]:
        """The prompts, one to `max_prompts`. Raises InvalidRequestError for an empty, mixed or overlong list."""
        prompts = one_or_many("prompt", self.prompt, max_prompts)
        if len(prompts) * self.num_sequences > MAX_CHOICES:
            name = "n" if self.best_of is None else "best_of"
            raise InvalidRequestError(
                f"{name} is {self.num_sequences} for {len(prompts)} prompts; allowed: together at most {MAX_CHOICES} "
                "answers",
                param=name,
            )
        return prompts

    def to_sampling_params(self, vocab_size: int, defaults: Mapping[str, float]) -> SamplingParams:
        """Sampling settings.

        With `echo`, the prompt's tokens need log-probabilities like the answer's.
        """
        wanted = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            wanted = max(self.logprobs, wanted or 0)
        form = answer_format(self)
        with renamed("guidance", "guidance" if form is None else form.param):
            return self.sampling_params(
                vocab_size,
                defaults,
                max_tokens=self.max_answer_tokens,
                logprobs=self.logprobs,
                prompt_logprobs=wanted,
                guidance=None if form is None else format_text(form),
            )
