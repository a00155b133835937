"""Owns the measurement of kernels against the machine's floor and against torch, and how its figures are shown.
Does not know any op (a case is built by the op's bench.py), nor any device (stands.py); the CLI is bench/kernels.py."""

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from servd_kernels.floor import Floor
from servd_kernels.registry import op_names

_ROUNDS = 4  # of the two measured in turn: a shared machine is not the same from second to second
_MOST_COPIES = 1024  # of small buffers: in a model those were written a moment ago, and come from a cache

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement. `make(i)` builds the i-th set of buffers and returns (ours, torch's) calls on it.

    An op's bench.py has `cases(device) -> list[Case]`, or CASES where it runs on a CPU alone.
    """

    name: str
    make: Callable[[int], tuple[Call, Call]]
    bytes: int  # moved by one call, at least
    flops: int = 0  # 0: bound by memory
    dtype: str = "float32"  # of the unit that computes: a key of Floor.flops


class Stand(Protocol):
    """A device to measure on."""

    device: str
    rotating_bytes: int  # buffers to rotate, so that none is in a cache when its turn comes

    def describe(self) -> str:
        """Machine, versions and measured limits, in one line."""

    def floor(self) -> Floor:
        """The machine's limits, now."""

    def time(self, calls: Iterator[Call], seconds: float) -> list[float]:
        """Seconds of each of the next calls, for about `seconds` in all."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one case took, all in seconds of one call."""

    ours: list[float]  # p20, p50, p80
    theirs: list[float]  # torch's: p20, p50, p80
    floor: float


def cases_of(op: str, device: str, only: str = "") -> list[Case]:
    """The op's cases for a device whose name contains `only`. Raises ValueError naming the known ops."""
    if op not in op_names():
        raise ValueError(f"unknown op {op!r}; known: {', '.join(op_names())}")
    module = importlib.import_module(f"servd_kernels.{op}.bench")
    if hasattr(module, "cases"):
        cases: Iterable[Case] = module.cases(device)
    else:
        cases = module.CASES if device == "cpu" else ()
    return [case for case in cases if only in case.name]


def time_case(case: Case, stand: Stand, seconds: float = 0.3) -> Timing:
    """Times ours and torch's for about `seconds` each, in turns, and the machine's limits beside them."""
    # Buffers rotate: in a model a layer's weights come from memory, not from the cache.
    copies = max(2, min(_MOST_COPIES, stand.rotating_bytes // case.bytes + 1))
    pairs = [case.make(i) for i in range(copies)]
    turns = [itertools.cycle([pair[side] for pair in pairs]) for side in (0, 1)]
    times: tuple[list[float], list[float]] = ([], [])
    floors = []
    for _ in range(_ROUNDS):
        floors.append(stand.floor().seconds(case.bytes, case.flops, case.dtype))
        for turn, found in zip(turns, times, strict=True):
            found.extend(stand.time(turn, seconds / _ROUNDS))
    return Timing(percentiles(times[0]), percentiles(times[1]), percentiles(floors)[1])


def percentiles(times: list[float]) -> list[float]:
    """p20, p50, p80."""
    ordered = sorted(times)
    return [ordered[len(ordered) * percent // 100] for percent in (20, 50, 80)]


def figures(op: str, case: Case, timing: Timing) -> dict[str, Any]:
    """What is told of one case; rates at the median. floor_share: of our time, what the floor would take."""
    low, median, high = timing.ours
    return {
        "op": op,
        "case": case.name,
        "p20_us": low * 1e6,
        "p50_us": median * 1e6,
        "p80_us": high * 1e6,
        "gb_per_s": case.bytes / median / 1e9,
        "gflop_per_s": case.flops / median / 1e9 if case.flops else None,
        "floor_us": timing.floor * 1e6,
        "floor_share": timing.floor / median,
        "torch_us": timing.theirs[1] * 1e6,
        "times_torch": timing.theirs[1] / median,
    }


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    key: str
    width: int  # of a line; a table needs none
    form: str = ".1f"

    def text(self, row: dict[str, Any]) -> str:
        value = row[self.key]
        return "-" if value is None else value if isinstance(value, str) else format(value, self.form)


_COLUMNS = (
    _Column("op", "op", -16),
    _Column("case", "case", -34),
    _Column("p20 us", "p20_us", 9),
    _Column("p50 us", "p50_us", 9),
    _Column("p80 us", "p80_us", 9),
    _Column("GB/s", "gb_per_s", 8),
    _Column("GFLOP/s", "gflop_per_s", 9),
    _Column("floor us", "floor_us", 9),
    _Column("of floor", "floor_share", 9, ".0%"),
    _Column("torch us", "torch_us", 9),
    _Column("x torch", "times_torch", 8, ".2f"),
)


def show_head(is_table: bool) -> str:
    """The names of the columns: of aligned lines, or of a Markdown table."""
    if is_table:
        marks = "|".join("---" if column.width < 0 else "---:" for column in _COLUMNS)
        return f"| {' | '.join(column.head for column in _COLUMNS)} |\n|{marks}|\n"
    return " ".join(_padded(column.head, column.width) for column in _COLUMNS).rstrip() + "\n"


def show_row(row: dict[str, Any], is_table: bool) -> str:
    """One result of `figures`, likewise."""
    if is_table:
        return f"| {' | '.join(column.text(row) for column in _COLUMNS)} |\n"
    return " ".join(_padded(column.text(row), column.width) for column in _COLUMNS).rstrip() + "\n"


def _padded(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)
