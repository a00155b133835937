"""How the served model writes tool calls and thoughts: chosen by name, or told from its chat template.

Knows nothing of single requests.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from servd.api.chat.reasoning_parsers import REASONING_PARSERS, ReasoningParser
from servd.api.chat.tool_parsers import TOOL_PARSERS, ToolParser
from servd.errors import InvalidRequestError
from servd.registry import Registry

_log = logging.getLogger("servd.chat")

T = TypeVar("T", type[ToolParser], type[ReasoningParser])


class TemplateFacts(Protocol):
    """What is asked of a tokenizer here."""

    special_token_ids: frozenset[int]
    template_variables: frozenset[str]
    template_source: str

    def token_id(self, text: str) -> int | None:
        """The one token that is written `text`."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as the model's text. Raises InvalidRequestError."""


@dataclass(frozen=True, slots=True)
class ParserChoice:
    """Names of parsers, "auto" or "none". Raises ConfigError for unknown ones."""

    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"

    def __post_init__(self) -> None:
        if self.tool_call_parser not in ("auto", "none"):
            TOOL_PARSERS.get(self.tool_call_parser)
        if self.reasoning_parser not in ("auto", "none"):
            REASONING_PARSERS.get(self.reasoning_parser)


@dataclass(frozen=True, slots=True)
class ChatFormats:
    """One model's formats. `template_knows_tools`: else servd tells the model of tools, in Hermes' format."""

    tool_parser: ToolParser | None
    reasoning_parser: type[ReasoningParser] | None
    template_knows_tools: bool
    template_knows_calls: bool
    takes_system: bool  # the template has a place for a system message
    template_variables: frozenset[str]
    token_ids: dict[str, int]  # of the parsers' markers that are one token
    special: frozenset[str]  # the markers that are special tokens

    @classmethod
    def of(cls, tokenizer: TemplateFacts, choice: ParserChoice) -> ChatFormats:
        """The formats of a model. A template whose format is unknown is not asked to show tools."""
        source = tokenizer.template_source
        knows_tools = "tools" in tokenizer.template_variables
        tools = _chosen(TOOL_PARSERS, choice.tool_call_parser, source if knows_tools else "")
        if tools is None and choice.tool_call_parser == "auto":
            if knows_tools:
                _log.warning("how this model writes tool calls is not known: servd asks for Hermes' format")
            tools, knows_tools = TOOL_PARSERS.get("hermes"), False
        reasoning = _chosen(REASONING_PARSERS, choice.reasoning_parser, source)
        markers = () if tools is None else tools.markers
        if reasoning is not None:
            markers += (reasoning.opening, reasoning.closing)
        token_ids = {text: i for text in markers if (i := tokenizer.token_id(text)) is not None}
        return cls(
            None if tools is None else tools(source),
            reasoning,
            knows_tools,
            knows_tools and "tool_calls" in source,
            _takes_system(tokenizer),
            tokenizer.template_variables,
            token_ids,
            frozenset(text for text, i in token_ids.items() if i in tokenizer.special_token_ids),
        )

    def marker(self, text: str) -> str:
        """The Lark term of a marker: spelled out, or the token of its own that the vocabulary has."""
        if text in self.special:
            return f"<[{self.token_ids[text]}]>"
        spelled = json.dumps(text)
        return f"({spelled} | <[{self.token_ids[text]}]>)" if text in self.token_ids else spelled


def _takes_system(tokenizer: TemplateFacts) -> bool:
    try:
        return "SYSTEM" in tokenizer.apply_chat_template(
            [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "hello"}]
        )
    except InvalidRequestError:
        return False


def _chosen(registry: Registry[T], name: str, template: str) -> T | None:
    if name == "none":
        return None
    if name != "auto":
        return registry.get(name)
    found: Iterable[T] = (registry.get(known) for known in registry.discover())
    return next((parser for parser in found if parser.is_written_by(template)), None)
