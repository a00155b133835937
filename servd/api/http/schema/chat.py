"""The body of /v1/chat/completions, field by field.

Knows nothing of templates or engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from servd.api.chat.call import ChatCall
from servd.api.chat.tools import check_json
from servd.api.conversation import MAX_TEMPLATE_VALUES, check_template_names
from servd.api.http.messages import ChatMessage, template_messages
from servd.api.http.schema.answer_format import answer_format
from servd.api.http.schema.chat_tools import NamedToolChoice, ToolDefinition, tool_choice_of, tools_of
from servd.api.http.schema.checks import check_count, check_range, renamed
from servd.api.http.schema.generation import GenerationRequest
from servd.errors import InvalidRequestError
from servd.sampling_params import MAX_LOGPROBS, SamplingParams

MAX_DOCUMENTS = 1024

class ChatCompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/chat/completions."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = GenerationRequest.NEUTRAL | {
        "functions": (None, []),  # OpenAI's older tools, whose replies have another shape
        "function_call": (None, "none"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "moderation": (None,),
        "store": (None, False),
        "web_search_options": (None,),
        "verbosity": (None, "medium"),
        "chat_template": (None,),
        "add_special_tokens": (None, False),
    }

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # tools and thought
    tools: list[ToolDefinition] | None = None
    tool_choice: str | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    # how the conversation becomes a prompt
    add_generation_prompt: bool | None = None  # true, unless the final message is continued
    continue_final_message: bool = False
    echo: bool = False  # the reply begins with the final message, if that is an assistant's
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    # refused unless neutral
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    moderation: Any = None
    store: Any = None
    web_search_options: Any = None
    verbosity: Any = None
    chat_template: Any = None
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
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt are true; allowed: one of the two",
                param="continue_final_message",
            )
        check_count("documents", self.documents or (), MAX_DOCUMENTS)
        check_json(self.documents, "documents", MAX_TEMPLATE_VALUES)
        check_json(self.chat_template_kwargs, "chat_template_kwargs", MAX_TEMPLATE_VALUES)
        check_template_names(self.chat_template_kwargs or ())

    def to_call(self, params: SamplingParams) -> ChatCall:
        """The conversation to be answered. Raises InvalidRequestError or UnsupportedError naming the field."""
        return ChatCall(
            template_messages(self.messages),
            params,
            tools=tools_of(self.tools),
            tool_choice=tool_choice_of(self.tool_choice, self.parallel_tool_calls),
            answer_format=answer_format(self),
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message,
            template_kwargs=self.chat_template_kwargs,
            documents=self.documents or (),
            reasoning_effort=self.reasoning_effort,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
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
