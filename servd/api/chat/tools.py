"""Tools as a model hears of them, and grammars that make it call them.

Knows nothing of how answers are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from servd.api.chat.call import AnswerFormat, ChatCall, Tool, ToolChoice
from servd.api.chat.formats import ChatFormats
from servd.api.chat.tool_parsers import CallGrammar
from servd.engine import guidance
from servd.engine.json_schema import check_keywords
from servd.errors import InvalidRequestError, UnsupportedError

MAX_TOOLS = 256
MAX_TOOL_NAME_CHARS = 128
MAX_TOOL_VALUES = 20_000  # numbers, texts, lists and objects in all tools' parameters
MAX_DEPTH = 64
MAX_FORCED_CALLS = 16  # in an answer under a grammar: a small model can go on with the same call for ever

_NAME = re.compile(r"[\w.:/-]+", re.ASCII)
_INTRODUCTION = (
    "You may call functions to help with what the user asks. Each line between <tools> and </tools> describes one as "
    "JSON:\n<tools>\n{tools}\n</tools>\nTo call a function, write its name and its arguments as JSON between tags, "
    'like this:\n<tool_call>\n{{"name": "FUNCTION", "arguments": {{"ARGUMENT": "VALUE"}}}}\n</tool_call>'
)


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raise InvalidRequestError for names, schemas or a choice that no model could be told of."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has {len(tools)} entries; allowed: at most {MAX_TOOLS}", param="tools")
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if len(tool.name) > MAX_TOOL_NAME_CHARS or not _NAME.fullmatch(tool.name):
            raise InvalidRequestError(
                f"tools[{i}] has the name {tool.name[:100]!r}; allowed: 1 to {MAX_TOOL_NAME_CHARS} letters, digits and "
                "_ . : / -",
                param=f"tools[{i}].function.name",
            )
        if tool.name in names:
            raise InvalidRequestError(f"tools has {tool.name!r} twice; allowed: each name once", param="tools")
        names.add(tool.name)
    check_json([dict(tool.parameters) for tool in tools if tool.parameters], "tools", MAX_TOOL_VALUES)
    for i, tool in enumerate(tools):
        if tool.parameters and tool.parameters.get("type", "object") != "object":
            raise InvalidRequestError(
                f"tools[{i}].function.parameters is of type {str(tool.parameters['type'])[:100]!r}; allowed: 'object'",
                param=f"tools[{i}].function.parameters",
            )
    if choice.name is not None and choice.name not in names:
        raise InvalidRequestError(
            f"tool_choice names {choice.name[:100]!r}; allowed: one of the tools", param="tool_choice"
        )
    if choice.mode == "required" and not tools:
        raise InvalidRequestError("tool_choice wants a call; allowed: with tools", param="tool_choice")


def check_json(value: object, field: str, max_values: int) -> None:
    """Raise InvalidRequestError for JSON data that is nested too deeply or holds too many values."""
    level: list[object] = [value]
    num_values = 0
    for _ in range(MAX_DEPTH + 2):  # a list of tools, and their parameters, stand around
        if not level:
            return
        num_values += len(level)
        if num_values > max_values:
            raise InvalidRequestError(f"{field} holds more than {max_values} values", param=field)
        level = [
            item
            for holder in level
            if isinstance(holder, (Mapping, list))
            for item in (holder.values() if isinstance(holder, Mapping) else holder)
        ]
    raise InvalidRequestError(f"{field} is nested more than {MAX_DEPTH} levels deep", param=field)


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as chat templates take them."""
    return [{"type": "function", "function": _described(tool)} for tool in tools]


def _described(tool: Tool) -> dict[str, Any]:
    # Some templates fail without a description, or without parameters.
    return {
        "name": tool.name,
        "description": tool.description or "",
        "parameters": tool.parameters or {"type": "object", "properties": {}},
    }


def told_in_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], *, takes_system: bool = True
) -> list[dict[str, Any]]:
    """A conversation for a template that knows no tools: they, calls and results as text, as Hermes and Qwen do it.

    `takes_system`: the template has a place for a system message; else the first message tells of the tools.
    """
    told: list[dict[str, Any]] = []
    follows_result = False
    for message in messages:
        message = dict(message)
        calls = message.pop("tool_calls", None)
        is_result = message["role"] == "tool"
        if calls:
            written = [_written(call["function"]) for call in calls]
            message["content"] = "\n".join([*filter(None, [message["content"]]), *written])
        elif is_result:
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            if follows_result:
                told[-1]["content"] += f"\n{content}"
                continue
            message = {"role": "user", "content": content}
        follows_result = is_result
        told.append(message)
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in template_tools(tools))
        introduction = _INTRODUCTION.format(tools=lines)
        if told[0]["role"] == "system":
            told[0]["content"] = f"{told[0]['content']}\n\n{introduction}".lstrip()
        elif not takes_system:
            told[0]["content"] = f"{introduction}\n\n{told[0]['content']}"
        else:
            told.insert(0, {"role": "system", "content": introduction})
    return told


def _written(function: Mapping[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(dict(function), ensure_ascii=False)}\n</tool_call>"


def answer_guidance(call: ChatCall, formats: ChatFormats, prompt_end: str) -> tuple[str, str] | None:
    """The grammar of the answer, and the field that asks for it; None if it is free.

    Calls are forced in the format that the model's parser reads. A model that thinks does so before.
    """
    tools = callable_tools(call)
    choice = call.tool_choice
    wanted = None if call.answer_format is None else format_text(call.answer_format)
    if tools and (choice.mode == "required" or not choice.parallel or wanted or any(tool.strict for tool in tools)):
        assert formats.tool_parser is not None, "the caller has refused tools"
        _check_strict(call.tools)
        grammar = formats.tool_parser.grammar(tools, formats.marker)
        lark = _calls(grammar, choice, formats, call.answer_format)
        param = "tool_choice" if choice.mode == "required" else "tools"
    elif wanted is not None:
        lark = "start: @servd_format"
    else:
        return None
    if call.answer_format is not None:
        param = call.answer_format.param if not tools or choice.mode != "required" else param
    thought = None if call.continue_final_message else _thought(formats, prompt_end)
    if thought is None and lark == "start: @servd_format" and wanted is not None:
        return wanted, param
    if thought is not None:
        lark = lark.replace("start:", f"start: {thought[0]} servd_answer\nservd_answer:", 1) + f"\n{thought[1]}"
    grammars: list[dict[str, Any]] = [{"lark_grammar": lark}]
    if wanted is not None and "@servd_format" in lark:
        first, *others = json.loads(wanted)["grammars"]
        grammars += [{**first, "name": "servd_format"}, *others]
    return json.dumps({"grammars": grammars}), param


def _check_strict(tools: Sequence[Tool]) -> None:
    for i, tool in enumerate(tools):
        if tool.strict and tool.parameters:
            try:
                check_keywords(tool.parameters)
            except InvalidRequestError as error:
                param = f"tools[{i}].function.parameters"
                raise type(error)(f"{param} with strict: {error.message}", param=param) from None


def can_be_strict(parameters: Mapping[str, Any] | None) -> bool:
    """Whether arguments can be held to the schema: it has no keyword that servd does not know."""
    try:
        check_keywords(parameters or {})
    except InvalidRequestError:
        return False
    return True


def callable_tools(call: ChatCall) -> tuple[Tool, ...]:
    """The tools that this answer may call."""
    if call.tool_choice.mode == "none":
        return ()
    name = call.tool_choice.name
    return call.tools if name is None else tuple(tool for tool in call.tools if tool.name == name)


def _calls(grammar: CallGrammar, choice: ToolChoice, formats: ChatFormats, wanted: AnswerFormat | None) -> str:
    """Lark text whose start is calls, forced, or begun at will."""
    following = f" ({grammar.following}){{0,{MAX_FORCED_CALLS - 1}}}" if choice.parallel else ""
    calls = f"{grammar.first}{following} {grammar.end}"
    marker = "" if grammar.marker is None else formats.marker(grammar.marker)
    rules = grammar.rules
    if choice.mode == "required":
        return f"start: {marker} {calls}\n{rules}"
    if wanted is not None:
        if not marker:
            raise UnsupportedError(
                f"{wanted.param} is set beside tools with tool_choice auto; this model's calls cannot be told from "
                "such answers; allowed: tool_choice none or required",
                param=wanted.param,
            )
        return f"start: {marker} {calls} | @servd_format\n{rules}"
    if grammar.marker is None:
        return f"start: servd_text | {calls}\nservd_text: /([^{re.escape(grammar.opens)}\\s](?s:.*))?/\n{rules}"
    openings = ["servd_spelled"]
    rules += f"\nservd_spelled[lazy]: SERVD_TEXT {json.dumps(grammar.marker)}\nSERVD_TEXT: /(?s:.*)/"
    if grammar.marker in formats.token_ids:
        openings.append(f"SERVD_TEXT <[{formats.token_ids[grammar.marker]}]>")
    return f"start: SERVD_TEXT | ({' | '.join(openings)}) {calls}\n{rules}"


def _thought(formats: ChatFormats, prompt_end: str) -> tuple[str, str] | None:
    """Term and rules of what a model may think before it answers; None if it does not."""
    parser = formats.reasoning_parser
    if parser is None or parser.is_over(prompt_end):
        return None
    opening, closing = parser.opening, parser.closing
    ends = [] if closing in formats.special else ["servd_spelled_thought"]
    rules = [f"servd_spelled_thought[lazy]: /(?s:.*){re.escape(closing).replace('/', chr(92) + '/')}/"] if ends else []
    if closing in formats.token_ids:
        ends.append(f"/(?s:.*)/ <[{formats.token_ids[closing]}]>")
    rules.append(f"servd_thought: ({' | '.join(ends)}) /\\s{{0,2}}/")
    if parser.begins_inside(prompt_end):
        return "servd_thought", "\n".join(rules)
    return f"({formats.marker(opening)} servd_thought)?", "\n".join(rules)


def format_text(wanted: AnswerFormat) -> str:
    """The grammar of an answer of this form."""
    match wanted.kind:
        case "json_object":
            return guidance.from_json_schema(guidance.ANY_JSON_OBJECT)
        case "json_schema":
            return guidance.from_json_schema(wanted.value, param=wanted.param)
        case "regex":
            return guidance.from_regex(wanted.value, param=wanted.param)
        case "choice":
            return guidance.from_choice(wanted.value, param=wanted.param)
        case "grammar":
            return guidance.from_lark(wanted.value)
