"""Command-line flags from the fields of the config dataclasses, and the dataclasses back from parsed flags.

Knows nothing of any particular setting: name, type, default, unit, choices and help are all the field's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from servd.config import parse_bytes
from servd.errors import ConfigError

ConfigClass = TypeVar("ConfigClass")


def add_flags(
    parser: argparse.ArgumentParser,
    config_class: type[Any],
    *,
    omit: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """One flag (or positional) for each field of the dataclass, in a group named after it.

    A command that has no use for a field omits it; `defaults` are those that it has of its own.
    """
    title = config_class.__name__.removesuffix("Config").lower()
    group = parser.add_argument_group(title, (config_class.__doc__ or "").strip())
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.name not in omit:
            _add_flag(group, field, hints[field.name], (defaults or {}).get(field.name, field.default))


def read_flags(arguments: argparse.Namespace, config_class: type[ConfigClass]) -> ConfigClass:
    """The dataclass that the parsed flags describe; an omitted field has its default."""
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    return config_class(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any, default: Any) -> None:
    kind = _plain_type(hint)
    options: dict[str, Any] = {"default": default, "help": help_text(field, default)}
    name = "--" + field.name.replace("_", "-")
    if kind is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        return
    options["type"] = _reader(kind, field.metadata["unit"]) if not field.metadata.get("positional") else kind
    if field.metadata.get("choices"):
        options["choices"] = field.metadata["choices"]
    if field.metadata.get("positional"):
        group.add_argument(field.name, nargs="?", metavar=field.name.upper(), **options)
    else:
        if "choices" not in options:
            options["metavar"] = field.metadata["unit"].upper() or {int: "N", float: "X", str: "TEXT"}[kind]
        group.add_argument(name, **options)


def help_text(field: dataclasses.Field[Any], default: Any) -> str:
    """The field's help with its unit and default: 'tokens in a KV block [tokens; default: 16]'."""
    text: str = field.metadata["help"]
    unit = field.metadata.get("unit")
    notes = [unit] if unit else []
    if default is not None:
        shown = ("on" if default else "off") if isinstance(default, bool) else "none" if default == "" else default
        notes.append(f"default: {shown}")
    elif "default" not in text:
        notes.append("default: none")
    return (f"{text} [{'; '.join(notes)}]" if notes else text).replace("%", "%%")


def _plain_type(hint: Any) -> type[Any]:
    """`int` for both `int` and `int | None`."""
    if isinstance(hint, types.UnionType):
        (hint,) = (member for member in typing.get_args(hint) if member is not type(None))
    assert isinstance(hint, type), hint
    return hint


def _reader(kind: type[Any], unit: str) -> Callable[[str], Any]:
    if unit != "bytes":
        return kind

    def size(text: str) -> int:
        try:
            return parse_bytes(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.message) from None

    return size
