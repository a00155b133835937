"""Chat templates in the sandbox: what transformers offers them, and how they fail."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from servd.engine.chat_template import ChatTemplate, load_chat_template
from servd.errors import ConfigError, InvalidRequestError
from servd.hub import ModelFiles

MESSAGES = [{"role": "user", "content": "hi <b> & 'q'"}]


def render(source: str, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(MESSAGES, **options)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi <b> & 'q'</s>"),
        ("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hi <b> & \'q\'"}'),
        ("{{ {'b': 1, 'a': '你'} | tojson(indent=1, sort_keys=true) }}", '{\n "a": "你",\n "b": 1\n}'),
        ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}", "2"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
        ("{{ '{0.__class__}'.format(1) }}", ""),
        ("{{ tools is none }} {{ add_generation_prompt }} {{ missing }}", "True True "),
    ],
)
def test_templates_get_what_transformers_gives(source: str, expected: str) -> None:
    assert render(source) == expected


def test_tools_and_kwargs_reach_the_template() -> None:
    source = "{{ tools[0].name }} {{ enable_thinking }} {{ add_generation_prompt }}"
    kwargs = {"enable_thinking": False}
    assert render(source, tools=[{"name": "f"}], template_kwargs=kwargs, add_generation_prompt=False) == "f False False"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ missing.field.deeper }}", "'missing' is undefined"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_blames_the_messages(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        render(source)
    assert raised.value.param == "messages"
    assert reason in raised.value.message


@pytest.mark.parametrize(
    "name", ["messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "tokenize", "chat_template",
             "raise_exception", "range", "namespace", "__class__", "_x", "not a name"],
)  # fmt: skip
def test_kwargs_cannot_take_the_servers_names(name: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        render("x", template_kwargs={name: 1})
    assert raised.value.param == "chat_template_kwargs"
    assert repr(name) in raised.value.message


def test_only_json_data_reaches_the_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(InvalidRequestError, match="a Path is not JSON data|PosixPath"):
        template.render([{"role": "user", "content": Path("/")}])


def test_rewrite_sees_every_string_of_the_caller_and_none_of_the_template() -> None:
    template = ChatTemplate("a{{ messages[0].content }}{{ tools[0].d[0] }}{{ k.z }}a{{ bos }}", {"bos": "a"})
    messages, tools, kwargs = [{"content": "a"}], [{"d": ["aa"]}], {"k": {"z": "ba"}}
    text = template.render(messages, tools=tools, template_kwargs=kwargs, rewrite=lambda s: s.replace("a", "#"))
    assert text == "a###b#aa"


def files_with(folder: Path, jinja: str | None = None) -> ModelFiles:
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return ModelFiles("m", folder, ())


def test_template_file_goes_before_tokenizer_config(tmp_path: Path) -> None:
    config = {"chat_template": "c", "bos_token": "<s>"}
    template = load_chat_template(files_with(tmp_path, "file {{ bos_token }}"), config)
    assert template is not None
    assert template.render(MESSAGES) == "file <s>"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("one", "one"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        (None, None),
        ("", None),
    ],
)
def test_template_of_tokenizer_config(tmp_path: Path, source: object, expected: str | None) -> None:
    config = json.loads(json.dumps({"chat_template": source}))
    template = load_chat_template(files_with(tmp_path), config)
    assert (template.render(MESSAGES) if template else None) == expected


def test_syntax_error_is_a_config_error_naming_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is not a valid chat template"):
        load_chat_template(files_with(tmp_path, "{% for %}"), {})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "takes longer than 2 s"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "longer than",
        ),
        ("{{ 'x' * 10000000000 }}", "'*' on values as large"),
        ("{{ 10000000000 * 'x' }}", "'*' on values as large"),
        ("{{ [1] * 10000000000 }}", "'*' on values as large"),
        ("{{ 10 ** 10000000000 }}", "'**' on values as large"),
    ],
)
def test_a_template_cannot_run_for_ever(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(reason)):
        render(source)


def test_small_products_are_fine() -> None:
    assert render("{{ 'ab' * 3 }} {{ 2 ** 10 }} {{ 1.5 * 2 }} {{ 2 * 3 }} {{ 2 ** -1 }}") == "ababab 1024 3.0 6 0.5"


def test_loops_and_macros_still_do_what_they_say() -> None:
    source = (
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}"
        "{% for m in messages if m.content %}{{ loop.index }}{{ twice(m.content) }}{% else %}none{% endfor %}"
    )
    assert render(source) == "1" + 2 * MESSAGES[0]["content"]
    assert render("{% for m in [] %}x{% else %}none{% endfor %}") == "none"


def test_a_template_tells_what_it_takes() -> None:
    template = ChatTemplate("{% if tools %}{{ bos_token }}{% endif %}{% set x = 1 %}{{ x }}{{ effort }}", {})
    assert template.variables == {"tools", "bos_token", "effort"}


def test_the_last_message_can_be_continued() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So, "}]
    template = ChatTemplate(source, {})
    assert template.render(messages, continue_final_message=True) == "<user>hi</>\n<assistant>So, "
    with pytest.raises(InvalidRequestError, match="cannot be continued"):
        ChatTemplate("{{ messages[0].content }}", {}).render(messages, continue_final_message=True)
