"""Spans of time as a tree: who called whom, how often, how long. Functions are replaced by ones that record.

Owns one thread's tree. Does not know what the spans mean.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

Cost = tuple[int, int, str]  # bytes that must move, operations, the unit that computes (a key of Floor.flops)


class Node:
    """All spans of one name below one parent."""

    __slots__ = ("children", "costs", "count", "name", "opened", "total_ns")

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.total_ns = 0
        self.opened = 0  # when the span that runs now began; 0: none does
        self.children: dict[str, Node] = {}
        self.costs: Counter[Cost] = Counter()

    def child(self, name: str) -> Node:
        """The child of that name, made if it is the first time."""
        node = self.children.get(name)
        if node is None:
            node = self.children[name] = Node(name)
        return node

    def as_dict(self, now: int) -> dict[str, Any]:
        """For JSON; a span that runs counts up to `now`."""
        return {
            "name": self.name,
            "count": self.count,
            "total_ns": self.total_ns + (now - self.opened if self.opened else 0),
            "costs": [[*cost, count] for cost, count in self.costs.items()],
            "children": [child.as_dict(now) for child in self.children.values()],
        }


class Recorder:
    """Records the spans of one thread. `clock`: nanoseconds; of the wall, or of this thread's own work."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.clock = clock
        self.root = Node("")
        self._current = self.root

    def begin(self, name: str) -> Node:
        """Open a span below the one that is open; `end` it."""
        parent = self._current
        node = self._current = parent.children.get(name) or parent.child(name)
        node.opened = self.clock()
        return parent

    def end(self, parent: Node) -> None:
        """Close what `begin` opened, which returned `parent`."""
        node = self._current
        node.total_ns += self.clock() - node.opened
        node.count += 1
        node.opened = 0
        self._current = parent

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a span around each call."""
        begin, end = self.begin, self.end

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            parent = begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                end(parent)

        return recorded

    def wrap(self, name: str, target: str) -> bool:
        """Replace `module:attribute` or `module:Class.method` by its recording form; False if there is none such."""
        module_name, _, path = target.partition(":")
        try:
            owner: Any = importlib.import_module(module_name)
            *classes, attribute = path.split(".")
            for class_name in classes:
                owner = getattr(owner, class_name)
            setattr(owner, attribute, self.wrapped(name, getattr(owner, attribute)))
        except (ImportError, AttributeError):
            return False
        return True

    def snapshot(self) -> dict[str, Any]:
        """The tree as it stands, spans that run included."""
        return self.root.as_dict(self.clock())

    def seconds_a_span(self, calls: int = 20_000) -> float:
        """What recording one span costs, measured on an empty function, beside this recorder's tree."""
        empty = Recorder(self.clock).wrapped("", lambda: None)
        start = time.perf_counter()
        for _ in range(calls):
            empty()
        return (time.perf_counter() - start) / calls


def difference(after: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """What happened between two snapshots of one tree."""
    if before is None:
        return after
    earlier = {child["name"]: child for child in before["children"]}
    costs = Counter({tuple(cost): count for *cost, count in after["costs"]})
    costs.subtract({tuple(cost): count for *cost, count in before["costs"]})
    return {
        "name": after["name"],
        "count": after["count"] - before["count"],
        "total_ns": after["total_ns"] - before["total_ns"],
        "costs": [[*cost, count] for cost, count in costs.items() if count],
        "children": [difference(child, earlier.get(child["name"])) for child in after["children"]],
    }
