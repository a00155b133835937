"""The bodies of /v1/messages and /v1/messages/count_tokens, field by field: honoured, without effect, or refused.

Source: Anthropic's API reference. Knows nothing of content blocks, tokens or engines.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from servd.api.chat.call import AnswerFormat, Tool, ToolChoice
from servd.api.chat.plan import THINKING_SWITCHES
from servd.api.chat.tools import MAX_TOOLS
from servd.api.http.anthropic.blocks import check_cache_control
from servd.api.http.fields import Fields
from servd.api.http.schema import GenerationRequest
from servd.api.http.schema.checks import check_count, check_neutral
from servd.errors import InvalidRequestError, UnsupportedError

Scalar = str | int | float | bool | None


class Metadata(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`metadata`: no effect."""

    user_id: str | None = None


class OutputFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`output_config.format`."""

    type: str
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`output_config`."""

    effort: str | None = None
    format: OutputFormat | None = None


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`thinking`."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class Conversation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both routes take."""

    # Fields that are refused unless they hold one of these values, which change nothing.
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "speed": (None, "standard"),
        "user_profile_id": (None,),
        "workspace_id": (None,),
        "mcp_servers": (None, []),
        "context_management": (None,),
        "output_format": (None,),
    }

    model: str
    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None  # no effect: prefixes are cached without being asked
    chat_template_kwargs: dict[str, Scalar] | None = None  # servd's, as in chat completions
    # refused unless neutral
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None
    mcp_servers: Any = None
    context_management: Any = None
    output_format: Any = None

    def check(self) -> None:
        """Raise UnsupportedError or InvalidRequestError for what no later step would notice."""
        check_neutral("", {name: getattr(self, name) for name in self.NEUTRAL}, self.NEUTRAL)
        check_cache_control(self.cache_control, "cache_control")
        if self.thinking is not None:
            self._check_thinking(self.thinking, None)

    def _check_thinking(self, thinking: Thinking, max_tokens: int | None) -> None:
        if thinking.type not in ("enabled", "disabled", "adaptive"):
            error = UnsupportedError if thinking.type == "between_tools" else InvalidRequestError
            raise error(
                f"thinking.type is {thinking.type[:100]!r}; allowed: 'enabled', 'disabled', 'adaptive'",
                param="thinking.type",
            )
        shown = {"thinking.display": (None, "summarized")}  # it is shown whole
        check_neutral("", {"thinking.display": thinking.display}, shown)
        if thinking.type != "enabled":
            check_neutral("", {"thinking.budget_tokens": thinking.budget_tokens}, {"thinking.budget_tokens": (None,)})
        elif thinking.budget_tokens is None:
            raise InvalidRequestError(
                "thinking.budget_tokens is missing; it is required", param="thinking.budget_tokens"
            )
        elif max_tokens is not None and thinking.budget_tokens < max_tokens - 1:
            raise UnsupportedError(
                f"thinking.budget_tokens is {thinking.budget_tokens}; servd does not cut a thought short of "
                f"max_tokens; allowed: {max_tokens - 1} (max_tokens - 1) or more, or thinking.type 'adaptive'",
                param="thinking.budget_tokens",
            )

    @property
    def reasoning_effort(self) -> str | None:
        """How much to think, in the words of the ChatCall."""
        if self.thinking is not None and self.thinking.type == "disabled":
            return "none"
        return None if self.output_config is None else self.output_config.effort

    @property
    def template_kwargs(self) -> dict[str, Any] | None:
        """What the chat template gets beside messages and tools: some must be told that thinking is wanted."""
        wanted = self.thinking is not None and self.thinking.type != "disabled"
        given: dict[str, Any] = dict.fromkeys(THINKING_SWITCHES, True) if wanted else {}
        return given | (self.chat_template_kwargs or {}) or None

    def answer_format(self) -> AnswerFormat | None:
        """What the text must be. Raises InvalidRequestError."""
        format = None if self.output_config is None else self.output_config.format
        if format is None:
            return None
        if format.type != "json_schema":
            raise InvalidRequestError(
                f"output_config.format.type is {format.type[:100]!r}; allowed: 'json_schema'",
                param="output_config.format.type",
            )
        return AnswerFormat("json_schema", format.schema, param="output_config.format.schema")

    def call_tools(self) -> tuple[tuple[Tool, ...], ToolChoice]:
        """The functions that may be called, and whether they must be. Raises UnsupportedError, InvalidRequestError."""
        check_count("tools", self.tools or (), MAX_TOOLS)
        tools = tuple(_tool(value, f"tools[{i}]") for i, value in enumerate(self.tools or ()))
        if self.tool_choice is None:
            return tools, ToolChoice()
        fields = Fields(self.tool_choice, "tool_choice")
        kind = fields.choice("type", "auto", "any", "tool", "none")
        name: str | None = fields.required("name", str) if kind == "tool" else None
        parallel = not fields.optional("disable_parallel_tool_use", bool)
        fields.close()
        if kind == "auto":
            return tools, ToolChoice("auto", parallel=parallel)
        if kind == "none":
            return tools, ToolChoice("none")
        return tools, ToolChoice("required", name, parallel)


class CountTokensRequest(Conversation, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/messages/count_tokens."""


class MessagesRequest(Conversation, kw_only=True, forbid_unknown_fields=True):
    """The body of /v1/messages."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = Conversation.NEUTRAL | {
        "container": (None,),
        "diagnostics": (None,),
        "inference_geo": (None,),
        "service_tier": (None, "auto", "standard_only"),
    }

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None
    # servd's own, as in chat completions
    seed: int | None = None
    ignore_eos: bool = False
    priority: int = 0
    cache_salt: str | None = None
    deadline_ms: int | None = None
    # refused unless neutral
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    service_tier: Any = None

    def check(self) -> None:
        """See Conversation.check."""
        Conversation.check(self)
        self.generation().check()
        if self.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {self.max_tokens}; allowed: at least 1", param="max_tokens")
        if self.thinking is not None:
            self._check_thinking(self.thinking, self.max_tokens)

    def generation(self) -> GenerationRequest:
        """The fields that all dialects share."""
        return GenerationRequest(
            stream=self.stream, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed,
            stop=self.stop_sequences, ignore_eos=self.ignore_eos, priority=self.priority, cache_salt=self.cache_salt,
            deadline_ms=self.deadline_ms,
        )  # fmt: skip


def _tool(value: object, where: str) -> Tool:
    fields = Fields(value, where)
    kind: str = fields.optional("type", str) or "custom"
    if kind != "custom":
        raise UnsupportedError(
            f"{where}.type is {kind[:100]!r}; servd has no tools of its own; allowed: 'custom'", param=f"{where}.type"
        )
    tool = Tool(
        fields.required("name", str),
        fields.optional("description", str),
        fields.required("input_schema", dict),
        fields.optional("strict", bool) or False,
    )
    check_cache_control(fields.optional("cache_control", dict), fields.path("cache_control"))
    fields.optional("eager_input_streaming", bool)  # it always is
    fields.neutral("allowed_callers", [], ["direct"])
    fields.neutral("defer_loading", False)
    fields.neutral("input_examples", [])
    fields.close()
    return tool
