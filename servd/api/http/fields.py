"""JSON objects of many kinds, such as the items of a list: fields are taken one by one, and what is left is refused.

For what msgspec's structs cannot tell apart. Knows nothing of any one dialect.
"""

from __future__ import annotations

from typing import Any

from servd.api.http.schema.checks import check_neutral
from servd.errors import InvalidRequestError

_KINDS = {str: "a string", bool: "true or false", int: "an integer", list: "an array", dict: "an object"}


class Fields:
    """The fields of one object, called `where` in errors. All methods raise InvalidRequestError naming the field."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise InvalidRequestError(f"{where} is {_kind_of(value)}; allowed: an object", param=where)
        self.where = where
        self._rest: dict[str, Any] = dict(value)

    def path(self, name: str) -> str:
        """What a field is called in errors."""
        return f"{self.where}.{name}"

    def required(self, name: str, *kinds: type) -> Any:
        """A value of one of the kinds."""
        value = self.optional(name, *kinds)
        if value is None:
            raise InvalidRequestError(f"{self.path(name)} is missing; it is required", param=self.path(name))
        return value

    def optional(self, name: str, *kinds: type) -> Any:
        """A value of one of the kinds, or None: null is the same as nothing."""
        value = self._rest.pop(name, None)
        if value is not None and type(value) not in kinds:
            allowed = " or ".join(_KINDS[kind] for kind in kinds)
            raise InvalidRequestError(
                f"{self.path(name)} is {_kind_of(value)}; allowed: {allowed}", param=self.path(name)
            )
        return value

    def choice(self, name: str, *allowed: str) -> str:
        """One of the texts."""
        value: str = self.required(name, str)
        if value not in allowed:
            raise InvalidRequestError(
                f"{self.path(name)} is {value[:100]!r}; allowed: {', '.join(map(repr, allowed))}", param=self.path(name)
            )
        return value

    def neutral(self, name: str, *allowed: object) -> None:
        """A field that servd knows and does not honour: refused unless it is null or one of these values."""
        check_neutral(self.where + ".", {name: self._rest.pop(name, None)}, {name: (None, *allowed)})

    def no_effect(self, *names: str) -> None:
        """Fields that may hold anything."""
        for name in names:
            self._rest.pop(name, None)

    def close(self) -> None:
        """Refuse what was not taken."""
        for name in self._rest:
            path = self.path(name[:100])
            raise InvalidRequestError(f"{path} is not a field that servd knows", param=path)


def _kind_of(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), "a number")
