"""Chat templates: a model's Jinja template, run in a sandbox as `transformers` runs it.

Owns the environment, what a template may cost, and how its failure becomes the caller's error. Knows nothing of token
ids.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from servd.errors import ConfigError, InvalidRequestError
from servd.hub.files import ModelFiles

TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MAX_ERROR_CHARS = 500
MAX_RENDER_SECONDS = 2.0  # of a thread's CPU time; a long conversation takes some milliseconds
MAX_PRODUCT = 1 << 20  # characters, items or bits that "*" and "**" may make
END_OF_MESSAGE = "\U0010ffff"  # a noncharacter: marks where an unfinished message ends
_STEP = "servd_step"  # called at each turn of a template's loops


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks text for training; for serving it is its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on what single operators can do."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [value.bit_length() if isinstance(value, int) else _length(value) for value in (left, right)]
        if isinstance(right, int) and not isinstance(left, float) and (operator == "**" or _length(left)):
            size = sizes[0] * right
        else:
            size = sizes[1] * left if isinstance(left, int) and _length(right) else sum(sizes)
        if size > MAX_PRODUCT:
            raise jinja2.TemplateError(f"{operator!r} on values as large as these is not allowed")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        # A thread cannot be stopped from outside: each turn of a loop looks at the clock itself.
        tree = super()._parse(source, name, filename)
        bodies: list[jinja2.nodes.For | jinja2.nodes.Macro] = [
            *tree.find_all(jinja2.nodes.For), *tree.find_all(jinja2.nodes.Macro)
        ]  # fmt: skip
        for loop in bodies:
            step = jinja2.nodes.Call(jinja2.nodes.Name(_STEP, "load"), [], [], None, None)
            loop.body.insert(0, jinja2.nodes.ExprStmt(step).set_lineno(loop.lineno))
        return tree


def _length(value: object) -> int:
    return len(value) if isinstance(value, Sized) else 0


class _Clock:
    """Ends a rendering that takes too long."""

    def __init__(self) -> None:
        self._end = time.thread_time() + MAX_RENDER_SECONDS
        self._num_steps = 0

    def step(self) -> None:
        self._num_steps += 1
        if self._num_steps % 64 == 0 and time.thread_time() > self._end:
            raise jinja2.TemplateError(f"it takes longer than {MAX_RENDER_SECONDS:g} s")


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. Rendering is thread-safe."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str = "the chat template") -> None:
        """`special_tokens`: bos_token, eos_token, … as text. Raises ConfigError if the source is no valid Jinja."""
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self.source = source
        self._reserved = {"messages", "tools", "add_generation_prompt", "tokenize", "chat_template", _STEP}
        self._reserved |= {*SPECIAL_TOKEN_NAMES, *environment.globals}
        try:
            # The names that it looks up: what a caller can give it.
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source))) - {_STEP}
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"{origin} is not a valid chat template: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        rewrite: Callable[[str], str] | None = None,
    ) -> str:
        """The conversation as the model's text; with `continue_final_message`, up to the end of its last content.

        `rewrite` is applied to every string that comes from the caller before the template sees it.
        Raises InvalidRequestError: param "messages" when the template refuses or fails, "chat_template_kwargs" for a
        name the template gets from servd itself.
        """
        if continue_final_message:
            messages = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}{END_OF_MESSAGE}"}]
        for name in template_kwargs or {}:
            if name in self._reserved or name.startswith("_") or not name.isidentifier():
                raise InvalidRequestError(
                    f"chat_template_kwargs holds {name!r}; allowed: names of the template's own variables, none of "
                    f"{', '.join(sorted(self._reserved))}",
                    param="chat_template_kwargs",
                )
        try:
            variables = plain_data(dict(template_kwargs or {}), rewrite)
            text: str = self._template.render(
                messages=plain_data(messages, rewrite),
                tools=None if tools is None else plain_data(tools, rewrite),
                add_generation_prompt=add_generation_prompt,
                **{_STEP: _Clock().step},
                **self._special_tokens,
                **variables,
            )
            return _cut(text) if continue_final_message else text
        except (
            jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
        ) as error:  # fmt: skip
            reason = (str(error) or type(error).__name__)[:MAX_ERROR_CHARS]
            raise InvalidRequestError(
                f"messages do not fit the model's chat template: {reason}", param="messages"
            ) from None


def _cut(text: str) -> str:
    """What stands before the end of the last message's content."""
    end = text.rfind(END_OF_MESSAGE)
    if end < 0:
        raise ValueError("the template leaves out the last message, which cannot be continued")
    return text[:end]


def plain_data(value: object, rewrite: Callable[[str], str] | None = None) -> Any:
    """A deep copy in plain JSON types, every string and key passed through `rewrite`.

    The template then holds no object with methods of its own. Raises TypeError for anything that is not JSON.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return rewrite(value) if rewrite else value
    if isinstance(value, Mapping):
        return {plain_data(key, rewrite): plain_data(item, rewrite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, rewrite) for item in value]
    raise TypeError(f"a {type(value).__name__} is not JSON data")


def special_token_text(value: object) -> str | None:
    """The text of a token as tokenizer_config.json writes it: a string, or an object with "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def load_chat_template(files: ModelFiles, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The model's template: chat_template.jinja, else tokenizer_config.json's; None if it has none.

    Raises ConfigError for a template that cannot be read or compiled.
    """
    special_tokens = {
        name: text for name in SPECIAL_TOKEN_NAMES if (text := special_token_text(tokenizer_config.get(name)))
    }
    path = files.folder / TEMPLATE_FILE
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), special_tokens, str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):  # named templates: [{"name": …, "template": …}]
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
        source = named.get("default")
    if not isinstance(source, str) or not source:
        return None
    return ChatTemplate(source, special_tokens, f"the chat template of {files.name}")
