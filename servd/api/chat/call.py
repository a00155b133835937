"""What a dialect's body becomes: messages, tools, the form of the answer, and how to sample it.

Plain values; checks are those that no dialect can make alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from servd.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of its arguments (None: takes none)."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False  # arguments follow the schema also where the model calls of its own accord


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are called: "none", "auto" (the model decides) or "required"; `name`: only that one."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    parallel: bool = True  # several calls in one answer


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What the answer's text must be.

    kind and value: "json_object" None; "json_schema" a schema; "regex" a pattern; "choice" a list of texts; "grammar"
    llguidance's Lark or GBNF text. `param` is what the client calls the field.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: Any = None
    param: str = "response_format"


@dataclass(slots=True)
class ChatCall:
    """A conversation to be answered."""

    messages: list[dict[str, Any]]  # as chat templates take them
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    answer_format: AnswerFormat | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] | None = None
    documents: Sequence[Mapping[str, Any]] = ()  # for templates that know them
    reasoning_effort: str | None = None  # none, minimal, low, medium, high, xhigh
    truncate_prompt_tokens: int | None = None  # keep the prompt's last so many; -1: what leaves room for the answer
