"""The body of /v1/chat/completions, field by field.

Knows nothing of templates, tools or engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from servd.api.http.messages import ChatMessage
from servd.api.http.schema.checks import check_range, renamed
from servd.api.http.schema.generation import GenerationRequest
from servd.errors import InvalidRequestError
from servd.sampling_params import MAX_LOGPROBS, SamplingParams

Scalar = str | int | float | bool | None

# What a template's caller may not override: the names that the renderer itself sets.
_RESERVED_TEMPLATE_NAMES = frozenset(
    ("messages", "tools", "documents", "tokenize", "chat_template", "add_generation_prompt", "continue_final_message",
     "bos_token", "eos_token", "raise_exception", "strftime_now", "conversation", "return_dict", "tokenizer")
)  # fmt: skip


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
            check_range("top_logprobs", self.top_logprobs, 0, MAX_LOGPROBS)
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
