"""The fields of a chat body that are about tools, in OpenAI's shape, and the tools they become.

Knows nothing of how models hear of tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from servd.api.chat.call import Tool, ToolChoice
from servd.api.chat.tools import MAX_TOOLS
from servd.api.http.schema.checks import check_count, shown
from servd.errors import InvalidRequestError, UnsupportedError


class FunctionDefinition(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that the model may call; `parameters` is a JSON schema of type object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool of type function; other types (custom) are refused."""

    type: str = "function"
    function: FunctionDefinition | None = None
    custom: Any = None


class FunctionName(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The name of a function."""

    name: str


class NamedTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One of the tools, by name."""

    function: FunctionName
    type: Literal["function"] = "function"


class AllowedTools(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Those of the tools that may, or of which one must, be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class NamedToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`tool_choice` that names the function to be called, or those that may be; other types are refused."""

    type: str = "function"
    function: FunctionName | None = None
    custom: Any = None
    allowed_tools: AllowedTools | None = None


def tools_of(definitions: Sequence[ToolDefinition] | None) -> tuple[Tool, ...]:
    """The tools of a body. Raises InvalidRequestError or UnsupportedError naming the field."""
    check_count("tools", definitions or (), MAX_TOOLS)
    return tuple(_tool(definition, f"tools[{i}]") for i, definition in enumerate(definitions or ()))


def _tool(definition: ToolDefinition, where: str) -> Tool:
    if definition.type != "function":
        raise UnsupportedError(f"{where}.type is {shown(definition.type)}; allowed: function", param=f"{where}.type")
    function = definition.function
    if function is None:
        raise InvalidRequestError(f"{where}.function is missing; it is required", param=f"{where}.function")
    return Tool(function.name, function.description, function.parameters, bool(function.strict))


def allowed_of(tools: tuple[Tool, ...], choice: str | NamedToolChoice | None) -> tuple[Tool, ...]:
    """The tools that the choice leaves: the model hears of no others. Raises InvalidRequestError."""
    if not isinstance(choice, NamedToolChoice) or choice.type != "allowed_tools" or choice.allowed_tools is None:
        return tools
    check_count("tool_choice.allowed_tools.tools", choice.allowed_tools.tools, MAX_TOOLS)
    names = {tool.function.name for tool in choice.allowed_tools.tools}
    if unknown := names - {tool.name for tool in tools}:
        raise InvalidRequestError(
            f"tool_choice.allowed_tools.tools names {min(unknown)[:100]!r}; allowed: the tools of the request",
            param="tool_choice.allowed_tools.tools",
        )
    return tuple(tool for tool in tools if tool.name in names)


def tool_choice_of(choice: str | NamedToolChoice | None, parallel: bool | None) -> ToolChoice:
    """Whether and which tools are called. Raises InvalidRequestError or UnsupportedError naming the field."""
    is_parallel = parallel is not False
    match choice:
        case None | "auto":
            return ToolChoice("auto", parallel=is_parallel)
        case "none":
            return ToolChoice("none")
        case "required":
            return ToolChoice("required", parallel=is_parallel)
        case NamedToolChoice(type="function", function=FunctionName(name=name)):
            # OpenAI's named choice is one call, whatever parallel_tool_calls says.
            return ToolChoice("required", name, parallel=False)
        case NamedToolChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=mode)):
            return ToolChoice(mode, parallel=is_parallel)
        case NamedToolChoice() if choice.type not in ("function", "allowed_tools"):
            raise UnsupportedError(
                f"tool_choice.type is {shown(choice.type)}; allowed: function, allowed_tools", param="tool_choice.type"
            )
    value = shown(choice) if isinstance(choice, str) else f"an object without {choice.type}"
    raise InvalidRequestError(
        f"tool_choice is {value}; allowed: none, auto, required or a function's name in an object", param="tool_choice"
    )
