"""Where the time of a run went: rows of a table from the trees of its processes, and whether they add up to the wall.

Owns what counts as an op, as Python between ops, as waiting. Does not know how rows are shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from bench.profiling.points import FORWARD, HTTP, IDLE, STEP

NATIVE_PREFIX = "native "
PYTHON = "Python"
AGREEMENT = 0.05  # how far the sum may be from the wall clock
Tree = dict[str, Any]


class Limits(Protocol):
    """The machine's limits (servd_kernels.floor.Floor)."""

    def seconds(self, moved: int, operations: int = 0, dtype: str = "float32") -> float:
        """The least time of work that moves so many bytes and computes so many operations."""


@dataclass(slots=True)
class Row:
    """One part of the time."""

    name: str
    count: int = 0
    seconds: float = 0.0
    floor_seconds: float | None = None  # of an op: what the machine's limits allow

    def add(self, count: int, seconds: float, floor_seconds: float | None = None) -> None:
        """The same part, once more."""
        self.count += count
        self.seconds += seconds
        if floor_seconds is not None:
            self.floor_seconds = (self.floor_seconds or 0.0) + floor_seconds


@dataclass(slots=True)
class Account:
    """One run at one concurrency. `worker` adds up to `wall`; `front` is what the front did meanwhile."""

    concurrency: int
    wall: float  # seconds, by the client's clock
    steps: int
    output_tokens: int
    worker: list[Row]
    front: list[Row]
    processors: dict[str, float]  # seconds of processor time by process
    recording: float  # seconds that recording itself took of the worker's thread, about
    latencies: dict[str, float | None] = field(default_factory=dict)

    @property
    def covered(self) -> float:
        """Seconds that the worker's rows explain."""
        return sum(row.seconds for row in self.worker)

    @property
    def agrees(self) -> bool:
        """Whether the parts add up to the wall clock."""
        return abs(self.covered / self.wall - 1) <= AGREEMENT

    @property
    def floor(self) -> float:
        """Seconds that the ops would take at the machine's limits, and nothing else would take any."""
        return sum(row.floor_seconds or 0.0 for row in self.worker)

    @property
    def parts(self) -> list[Row]:
        """The worker's rows by op or part, whatever the shape; largest first."""
        parts: dict[str, Row] = {}
        for row in self.worker:
            is_op = row.floor_seconds is not None
            name = row.name.split(" ")[0] if is_op else row.name if PYTHON in row.name else row.name.split(":")[0]
            _row(parts, name).add(row.count if is_op else 0, row.seconds, row.floor_seconds)
        return sorted(parts.values(), key=lambda row: -row.seconds)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {"covered": self.covered, "agrees": self.agrees, "floor": self.floor}
        return dataclasses.asdict(self) | derived


def steps_of(tree: Tree) -> int:
    """Steps that the worker computed."""
    return sum(node["count"] for node in _walk(tree) if node["name"] == STEP)


def spans_of(tree: Tree) -> int:
    """Spans that were recorded."""
    return sum(node["count"] for node in _walk(tree))


def worker_rows(tree: Tree, limits: Limits | None) -> list[Row]:
    """Every nanosecond of the worker's spans in one row, largest first; ops by name and shape."""
    rows: dict[str, Row] = {}
    for node in tree["children"]:
        _account(node, rows, limits, inside=node["name"])
    return sorted(rows.values(), key=lambda row: -row.seconds)


def front_rows(tree: Tree, thread_seconds: float, wall: float) -> list[Row]:
    """The front's loop: its parts in processor time, the rest of what it did, and its wait."""
    rows: dict[str, Row] = {}
    for node in tree["children"]:
        _account(node, rows, None, inside=node["name"])
    known = sum(row.seconds for row in rows.values())
    rest = Row(f"{HTTP}: parse, write, event loop", 0, max(0.0, thread_seconds - known))
    wait = Row(f"{IDLE}: waits, or for a processor", 0, max(0.0, wall - thread_seconds))
    return [*sorted([*rows.values(), rest], key=lambda row: -row.seconds), wait]


def _account(node: Tree, rows: dict[str, Row], limits: Limits | None, inside: str) -> None:
    name, total = node["name"], node["total_ns"] / 1e9
    own = total - sum(child["total_ns"] for child in node["children"]) / 1e9
    if node["costs"]:
        native = sum(child["total_ns"] for child in node["children"]) / 1e9 or total
        _row(rows, name).add(node["count"], native, _floor(node, limits))
        _row(rows, f"{inside}: {PYTHON} within ops").add(0, total - native)
        return
    if name in (STEP, FORWARD):
        _row(rows, f"{name}: {PYTHON} and torch between its parts").add(0, own)
    else:
        _row(rows, name).add(node["count"], own)
    for child in node["children"]:
        _account(child, rows, limits, inside=name if not name.startswith(NATIVE_PREFIX) else inside)


def _row(rows: dict[str, Row], name: str) -> Row:
    return rows.setdefault(name, Row(name))


def _floor(node: Tree, limits: Limits | None) -> float | None:
    if limits is None:
        return None
    costs: list[tuple[int, int, str, int]] = node["costs"]
    return sum(limits.seconds(moved, operations, unit) * count for moved, operations, unit, count in costs)


def _walk(tree: Tree) -> Iterator[Tree]:
    yield tree
    for child in tree["children"]:
        yield from _walk(child)
