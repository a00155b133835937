"""Shows accounts: Markdown tables, and a flame graph as a still SVG picture.

Does not know how anything was measured.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Iterator
from html import escape

from bench.profiling.account import AGREEMENT, Account, Row, Tree

SMALLEST_SHARE = 0.003  # of the wall: smaller rows are shown as one
WIDTH, LINE, CHARACTER, SMALLEST_PIXELS = 1200, 17, 6.6, 0.4


def table(account: Account) -> str:
    """The account as Markdown tables: the worker by part, with what they add up to, its ops, and the front."""
    wall, steps, kernels = account.wall, max(account.steps, 1), account.kernels
    processors = ", ".join(f"{name} {seconds / wall:.0%}" for name, seconds in account.processors.items())
    lines = [
        f"### {account.concurrency} at a time: {account.output_tokens / wall:,.1f} output tokens/s, "
        f"{steps:,} steps in {wall:.2f} s, {1e3 * wall / steps:.2f} ms a step\n",
        *_head("the worker's thread"),
        *_shown(account.parts, wall, steps),
        f"| **sum** | | {1e3 * account.covered / steps:.3f} | **{account.covered / wall:.1%}** |",
        f"\nThe sum {'agrees' if account.agrees else 'DOES NOT AGREE'} with the wall within {AGREEMENT:.0%}. "
        f"Processor time, of one core's wall: {processors}. "
        f"Recording took about {account.recording / wall:.1%} of the worker's thread.",
    ]
    if kernels is not None:
        took = sum(row.seconds for row in kernels.rows)
        lines += [
            f"\nAt the machine's limits the step's ops would take {1e3 * kernels.floor_a_step:.2f} ms, "
            f"{kernels.floor_a_step * steps / wall:.0%} of the wall. Each called by itself ({kernels.rate:,.1f} "
            f"output tokens/s), they take:\n",
            *_head("op", with_floor=True),
            *_shown(kernels.by_op, took, kernels.steps, with_floor=True),
            "",
            *_head("op, rows x columns", with_floor=True),
            *_shown(kernels.rows, took, kernels.steps, with_floor=True),
        ]
    return "\n".join([*lines, "", *_head("meanwhile the front's loop"), *_shown(account.front, wall, steps), ""])


def _head(what: str, with_floor: bool = False) -> tuple[str, str]:
    head, rule = f"| {what} | a step | ms a step | share |", "|---|--:|--:|--:|"
    return (head + " floor ms | of floor |", rule + "--:|--:|") if with_floor else (head, rule)


def _shown(rows: list[Row], whole: float, steps: int, with_floor: bool = False) -> Iterator[str]:
    """A line for each row; shares are of `whole` seconds."""
    small = Row("smaller parts")
    for row in rows:
        if row.seconds < SMALLEST_SHARE * whole:
            small.add(row.count, row.seconds, row.floor_seconds)
        else:
            yield _line(row, whole, steps, with_floor)
    if small.seconds:
        yield _line(small, whole, steps, with_floor)


def _line(row: Row, whole: float, steps: int, with_floor: bool) -> str:
    name, count = row.name.replace("|", "\\|"), f"{row.count / steps:.1f}" if row.count else ""
    line = f"| {name} | {count} | {1e3 * row.seconds / steps:.3f} | {row.seconds / whole:.1%} |"
    if not with_floor:
        return line
    floor = row.floor_seconds or 0.0
    return f"{line} {1e3 * floor / steps:.3f} | {floor / row.seconds:.0%} |"


def flame_graph(title: str, trees: dict[str, Tree], wall: float) -> str:
    """SVG: for each process a stack of frames, as wide as their share of `wall` seconds; callers below callees.

    Hovering shows a frame's whole name, its time and calls (Gregg 2016, "The Flame Graph").
    """
    frames: list[str] = []
    top = 2 * LINE
    for name, tree in trees.items():
        total = sum(child["total_ns"] for child in tree["children"])
        root: Tree = {**tree, "name": name, "total_ns": total, "count": 1}
        depth = _depth(root)
        frames += _frames(root, 0.0, top + (depth - 1) * LINE, WIDTH / (wall * 1e9), wall)
        top += (depth + 1) * LINE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}" '
        'font-family="monospace" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="4" y="{LINE}" font-size="13">{escape(title)}</text>'
    )
    return "\n".join([head, *frames, "</svg>\n"])


def _depth(tree: Tree) -> int:
    return 1 + max((_depth(child) for child in tree["children"]), default=0)


def _frames(tree: Tree, x: float, y: float, scale: float, wall: float) -> Iterator[str]:
    width = tree["total_ns"] * scale
    if width < SMALLEST_PIXELS:
        return
    name, seconds = tree["name"], tree["total_ns"] / 1e9
    letters = int((width - 4) / CHARACTER)
    text = name if len(name) <= letters else name[: letters - 1] + "…" if letters > 3 else ""
    yield (
        f"<g><title>{escape(name)}: {seconds:.3f} s, {seconds / wall:.1%}, {tree['count']:,} calls</title>"
        f'<rect x="{x:.1f}" y="{y:.0f}" width="{max(width - 0.5, 0.3):.1f}" height="{LINE - 1}" fill="{_color(name)}"/>'
        f'<text x="{x + 2:.1f}" y="{y + 12:.0f}">{escape(text)}</text></g>'
    )
    for child in sorted(tree["children"], key=lambda child: -child["total_ns"]):
        yield from _frames(child, x, y - LINE, scale, wall)
        x += child["total_ns"] * scale


def _color(name: str) -> str:
    """The same for all frames of one part or op."""
    hue = zlib.crc32(name.split(":")[0].split(" ")[0].encode()) % 360 / 360
    red, green, blue = colorsys.hls_to_rgb(hue, 0.75, 0.6)
    return f"rgb({255 * red:.0f},{255 * green:.0f},{255 * blue:.0f})"
