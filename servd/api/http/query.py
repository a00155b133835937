"""The parameters of a URL's query: refused unless known, and read one by one.

Knows nothing of any one route's.
"""

from __future__ import annotations

from collections.abc import Collection

from multidict import MultiMapping

from servd.errors import InvalidRequestError

_BOOLS = {"true": True, "false": False}


def check_known(query: MultiMapping[str], known: Collection[str]) -> None:
    """Raise InvalidRequestError for a parameter that is none of `known`."""
    for name in query:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise InvalidRequestError(
                f"{name[:100]!r} is not known in the query; allowed: {allowed}", param=name[:100]
            )


def truth(query: MultiMapping[str], name: str) -> bool:
    """True or false, false unless given. Raises InvalidRequestError."""
    return _BOOLS[choice(query, name, "false", tuple(_BOOLS))]


def choice(query: MultiMapping[str], name: str, default: str, allowed: Collection[str]) -> str:
    """One of the texts, or the default. Raises InvalidRequestError."""
    text = query.get(name, default)
    if name in query and text not in allowed:
        raise InvalidRequestError(f"{name} is {text[:100]!r}; allowed: {', '.join(allowed)}", param=name)
    return text


def whole_number(query: MultiMapping[str], name: str, default: int, low: int, high: int) -> int:
    """A number from `low` to `high`, or the default. Raises InvalidRequestError."""
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 15 and low <= int(text) <= high):
        raise InvalidRequestError(f"{name} is {text[:100]!r}; allowed: {low} to {high}", param=name)
    return int(text)
