"""A name → object table filled by the files of one folder; importing a file registers its member.

Knows nothing of what is registered. Only the file that is asked for is imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from servd.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Members of one kind, by name. A member's file in `package` is imported when it is first asked for."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._members: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator: make the object known under `names`; a name can be taken once."""

        def add(member: T) -> T:
            for name in names:
                assert name not in self._members, f"{self.kind} {name!r} is registered twice"
                self._members[name] = member
            return member

        return add

    def discover(self) -> list[str]:
        """Import every file of the package and return all registered names, sorted."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        return sorted(self._members)

    def get(self, name: str) -> T:
        """The member called `name`. Raises ConfigError naming the known ones."""
        if name not in self._members:
            try:  # by convention the file is called like its member: import that one alone
                importlib.import_module(f"{self.package}.{name}")
            except ModuleNotFoundError:
                self.discover()  # a member that shares a file with others, or an unknown name
        if name not in self._members:
            raise ConfigError(f"unknown {self.kind} {name!r}; known: {', '.join(self.discover())}")
        return self._members[name]
