"""Checks of single fields, whose errors name the field, its value and what is allowed.

Knows nothing of which endpoint has which field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from servd.errors import InvalidRequestError, UnsupportedError
from servd.sampling_params import MAX_LOGIT_BIASES, MAX_STOP_CHARS, MAX_STOP_TOKEN_IDS


@contextmanager
def renamed(name: str, client_name: str) -> Iterator[None]:
    """Errors about `name` speak of the field as the client called it."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param != name or name == client_name:
            raise
        raise type(error)(error.message.replace(name, client_name, 1), param=client_name) from None


def logit_bias(biases: dict[str, float] | None) -> dict[int, float] | None:
    if biases is None:
        return None
    check_count("logit_bias", biases, MAX_LOGIT_BIASES)
    for key in biases:
        if not (key.isascii() and key.removeprefix("-").isdigit() and len(key) <= 20):
            raise InvalidRequestError(
                f"logit_bias has the key {key[:100]!r}; allowed: token ids written as decimal numbers",
                param="logit_bias",
            )
    return {int(key): bias for key, bias in biases.items()}


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in stops[:64]:  # more than that is refused for its number
        check_length("stop", text, 0, MAX_STOP_CHARS, "characters in a string")
    return stops


def stop_token_ids(token_ids: list[int] | None) -> tuple[int, ...]:
    check_count("stop_token_ids", token_ids or (), MAX_STOP_TOKEN_IDS)
    return tuple(token_ids or ())


def check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequestError(f"{field} is {value}; allowed: {low} to {high}", param=field)


def check_length(field: str, value: str, low: int, high: int, unit: str) -> None:
    if not low <= len(value) <= high:
        raise InvalidRequestError(f"{field} has {len(value)} {unit}; allowed: {low} to {high}", param=field)


def check_count(field: str, values: Any, high: int) -> None:
    if len(values) > high:
        raise InvalidRequestError(f"{field} has {len(values)} entries; allowed: at most {high}", param=field)


def check_neutral(prefix: str, values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise UnsupportedError for a field of `neutral` that holds none of the values which change nothing."""
    for name, allowed in neutral.items():
        value = values[name]
        if not any(value == known and type(value) is type(known) for known in allowed):
            raise UnsupportedError(
                f"{prefix}{name} is {shown(value)}; servd does not honour it; allowed: "
                f"{' or '.join(map(shown, allowed))}",
                param=prefix + name,
            )


def one_or_many(field: str, given: str | list[str | int | list[int]], high: int) -> list[str | list[int]]:
    """The texts or token ids of a field, one to `high`. Raises InvalidRequestError for an empty or mixed list."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequestError(f"{field} is an empty list; allowed: at least one {field} or token", param=field)
    kinds = set(map(type, given))
    if len(kinds) > 1:
        raise InvalidRequestError(
            f"{field} is a list of mixed kinds; allowed: all strings, all token ids, or all lists of token ids",
            param=field,
        )
    if kinds == {int}:
        return [given]  # type: ignore[list-item]  # all of them are ints
    if len(given) > high:
        raise InvalidRequestError(f"{field} has {len(given)} {field}s; allowed: at most {high}", param=field)
    return given  # type: ignore[return-value]  # no ints among them


def shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
