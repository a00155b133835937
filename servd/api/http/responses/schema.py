"""The body of POST /v1/responses, field by field: honoured, without effect, or refused by name.

Source: OpenAI's API reference. Knows nothing of items, tokens or engines.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from servd.api.chat.call import AnswerFormat, Tool, ToolChoice
from servd.api.chat.tools import MAX_TOOLS, can_be_strict
from servd.api.http.fields import Fields
from servd.api.http.schema import GenerationRequest
from servd.api.http.schema.checks import check_count, check_length, check_neutral, check_range
from servd.errors import InvalidRequestError, UnsupportedError
from servd.sampling_params import MAX_LOGPROBS

MAX_METADATA = 16  # pairs
MAX_METADATA_KEY, MAX_METADATA_VALUE = 64, 512  # characters
LOGPROBS = "message.output_text.logprobs"

# What these would add belongs to items that servd never makes.
_EMPTY_INCLUDES = (
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "web_search_call.action.sources", "web_search_call.results",
)  # fmt: skip
INCLUDES = (LOGPROBS, *_EMPTY_INCLUDES)

Scalar = str | int | float | bool | None


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`text.format`."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None  # no effect: a schema is always followed


class TextConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`text`."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`reasoning`."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponseStreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`stream_options`."""

    include_obfuscation: bool = False
    resumable: bool = False  # servd: goes on for a while without its client (see event_stream)


class ResponseRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A response to be made."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "conversation": (None,),
        "prompt": (None,),
        "truncation": (None, "disabled"),
        "service_tier": (None, "auto", "default"),
        "context_management": (None, []),
        "moderation": (None,),
        "image": (None,),
        "access_programs": (None,),
        "background_options": (None, {}),
        "prompt_cache_retention": (None, "in_memory"),
        "prompt_cache_options": (None, {}),
    }

    input: str | list[Any] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    # sampling
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    # form of the reply
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    # bookkeeping, given back as it came; no other effect
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    max_tool_calls: int | None = None  # of built-in tools, of which there are none
    # servd's own, as in chat completions
    seed: int | None = None
    stop: str | list[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    chat_template_kwargs: dict[str, Scalar] | None = None
    priority: int = 0
    cache_salt: str | None = None
    deadline_ms: int | None = None
    # refused unless neutral
    conversation: Any = None
    prompt: Any = None
    truncation: Any = None
    service_tier: Any = None
    context_management: Any = None
    moderation: Any = None
    image: Any = None
    access_programs: Any = None
    background_options: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    def check(self) -> None:
        """Raise UnsupportedError or InvalidRequestError for what no later step would notice."""
        check_neutral("", {name: getattr(self, name) for name in self.NEUTRAL}, self.NEUTRAL)
        if self.background and self.store is False:
            raise InvalidRequestError("store is false; allowed with background: true or none", param="store")
        if self.stream_options is not None:
            if not self.stream:
                raise InvalidRequestError("stream_options is set; allowed: with stream: true", param="stream_options")
            if self.stream_options.include_obfuscation:
                raise UnsupportedError(
                    "stream_options.include_obfuscation is true; allowed: false", param="stream_options"
                )
            if self.stream_options.resumable and self.background:
                raise InvalidRequestError(
                    "stream_options.resumable is true; allowed: false for a background response, whose events "
                    "GET /v1/responses/{id}?stream=true sends again",
                    param="stream_options",
                )
        self.generation().check()
        self._check_metadata()
        if self.max_tool_calls is not None:
            check_range("max_tool_calls", self.max_tool_calls, 1, 1 << 31)
        check_includes(self.include)
        if self.top_logprobs is not None:
            check_range("top_logprobs", self.top_logprobs, 0, MAX_LOGPROBS)
            if self.top_logprobs and not self.shows_logprobs:
                raise InvalidRequestError(
                    f"top_logprobs is {self.top_logprobs}; allowed only with {LOGPROBS!r} in include",
                    param="top_logprobs",
                )
        reasoning = msgspec.structs.asdict(self.reasoning or ReasoningConfig())
        auto = (None, "auto")  # reasoning is not summed up but shown whole
        neutral = {"summary": auto, "generate_summary": auto, "context": auto, "mode": (None, "standard")}
        check_neutral("reasoning.", reasoning, neutral)
        check_neutral("text.", {"verbosity": self.text and self.text.verbosity}, {"verbosity": (None, "medium")})

    def _check_metadata(self) -> None:
        check_count("metadata", self.metadata or {}, MAX_METADATA)
        for key, value in (self.metadata or {}).items():
            check_length("metadata", key, 1, MAX_METADATA_KEY, "characters in a key")
            check_length("metadata", value, 0, MAX_METADATA_VALUE, "characters in a value")

    @property
    def shows_logprobs(self) -> bool:
        """Whether the text's tokens come with their log-probabilities."""
        return LOGPROBS in (self.include or ())

    def generation(self) -> GenerationRequest:
        """The fields that all dialects share."""
        return GenerationRequest(
            stream=self.stream, temperature=self.temperature, top_p=self.top_p, seed=self.seed, stop=self.stop,
            top_k=self.top_k, min_p=self.min_p, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, repetition_penalty=self.repetition_penalty,
            ignore_eos=self.ignore_eos, priority=self.priority, cache_salt=self.cache_salt,
            deadline_ms=self.deadline_ms,
        )  # fmt: skip

    def answer_format(self) -> AnswerFormat | None:
        """What the text must be. Raises InvalidRequestError."""
        format = None if self.text is None else self.text.format
        if format is None or format.type == "text":
            return None
        if format.type == "json_object":
            return AnswerFormat("json_object", param="text.format")
        if format.type != "json_schema":
            raise InvalidRequestError(
                f"text.format.type is {format.type[:100]!r}; allowed: 'text', 'json_object', 'json_schema'",
                param="text.format.type",
            )
        for name in ("name", "schema"):
            if getattr(format, name) is None:
                raise InvalidRequestError(
                    f"text.format.{name} is missing; it is required", param=f"text.format.{name}"
                )
        return AnswerFormat("json_schema", format.schema, param="text.format.schema")

    def call_tools(self) -> tuple[tuple[Tool, ...], ToolChoice]:
        """The functions that may be called, and whether they must be. Raises UnsupportedError, InvalidRequestError."""
        check_count("tools", self.tools or (), MAX_TOOLS)
        tools = tuple(_tool(value, f"tools[{i}]") for i, value in enumerate(self.tools or ()))
        parallel = self.parallel_tool_calls is not False
        choice = self.tool_choice
        if choice is None or isinstance(choice, str):
            if choice not in (None, "none", "auto", "required"):
                raise InvalidRequestError(
                    f"tool_choice is {choice[:100]!r}; allowed: 'none', 'auto', 'required', or an object of type "
                    "'function' or 'allowed_tools'",
                    param="tool_choice",
                )
            return tools, ToolChoice(choice or "auto", parallel=parallel)  # type: ignore[arg-type]  # checked above
        fields = Fields(choice, "tool_choice")
        kind: str = fields.required("type", str)
        if kind == "function":
            name: str = fields.required("name", str)
            fields.close()
            return tools, ToolChoice("required", name, parallel)
        if kind == "allowed_tools":
            mode = fields.choice("mode", "auto", "required")
            names = _tool_names(fields.required("tools", list))
            fields.close()
            if missing := names - {tool.name for tool in tools}:
                raise InvalidRequestError(
                    f"tool_choice.tools holds {min(missing)[:100]!r}; allowed: names of tools",
                    param="tool_choice.tools",
                )
            allowed = tuple(tool for tool in tools if tool.name in names)
            return allowed, ToolChoice(mode, parallel=parallel)  # type: ignore[arg-type]  # checked above
        raise UnsupportedError(
            f"tool_choice.type is {kind[:100]!r}; allowed: 'function', 'allowed_tools'", param="tool_choice.type"
        )


def check_includes(include: list[str] | None) -> None:
    """Raise UnsupportedError or InvalidRequestError for a part of responses that cannot be had."""
    for name in include or ():
        if name == "reasoning.encrypted_content":
            raise UnsupportedError(
                f"include holds {name!r}; servd shows reasoning as it is, in the content of its items", param="include"
            )
        if name not in INCLUDES:
            raise InvalidRequestError(
                f"include holds {name[:100]!r}; allowed: {', '.join(INCLUDES)}", param="include"
            )


def _tool(value: object, where: str) -> Tool:
    """A function; unless told otherwise it is strict, where its schema permits that: so OpenAI has it in Responses."""
    fields = Fields(value, where)
    kind: str = fields.required("type", str)
    if kind != "function":
        raise UnsupportedError(
            f"{where}.type is {kind[:100]!r}; servd has no built-in tools; allowed: 'function'", param=f"{where}.type"
        )
    name, description = fields.required("name", str), fields.optional("description", str)
    parameters: dict[str, Any] | None = fields.optional("parameters", dict)
    strict: bool | None = fields.optional("strict", bool)
    tool = Tool(name, description, parameters, can_be_strict(parameters) if strict is None else strict)
    fields.neutral("async", False)
    fields.neutral("allowed_callers", [], ["direct"])
    fields.neutral("defer_loading", False)
    fields.neutral("output_schema")
    fields.close()
    return tool


def _tool_names(tools: list[Any]) -> set[str]:
    names = set()
    for i, value in enumerate(tools):
        fields = Fields(value, f"tool_choice.tools[{i}]")
        fields.choice("type", "function")
        names.add(fields.required("name", str))
        fields.close()
    return names
