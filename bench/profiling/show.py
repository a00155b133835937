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
    """The account as Markdown tables: by part with what they add up to, op by op, and the front."""
    wall, steps = account.wall, max(account.steps, 1)
    rate = account.output_tokens / wall
    ops = [row for row in account.worker if row.floor_seconds is not None]
    return "\n".join(
        [
            f"### {account.concurrency} at a time: {rate:,.1f} output tokens/s, {steps:,} steps in {wall:.2f} s, "
            f"{1e3 * wall / steps:.2f} ms a step\n",
            *_head("the worker's thread"),
            *_shown(account.parts, wall, steps),
            f"| **sum** | | {1e3 * account.covered / steps:.3f} | **{account.covered / wall:.1%}** of the wall "
            f"({'agrees' if account.agrees else 'DOES NOT AGREE'} within {AGREEMENT:.0%}) "
            f"| {1e3 * account.floor / steps:.3f} | {account.floor / wall:.0%} |\n",
            *_head("of this, op by op (rows x columns)"),
            *_shown(ops, wall, steps),
            "",
            *_head("meanwhile the front's loop"),
            *_shown(account.front, wall, steps),
            "",
            "Processor time, of one core's wall: "
            + ", ".join(f"{name} {seconds / wall:.0%}" for name, seconds in account.processors.items())
            + f". Recording took about {account.recording / wall:.1%} of the worker's thread.\n",
        ]
    )


def _head(what: str) -> tuple[str, str]:
    return f"| {what} | a step | ms a step | share | floor ms | of floor |", "|---|--:|--:|--:|--:|--:|"


def _shown(rows: list[Row], wall: float, steps: int) -> Iterator[str]:
    small = Row("smaller parts")
    for row in rows:
        if row.seconds < SMALLEST_SHARE * wall:
            small.add(row.count, row.seconds, row.floor_seconds)
        else:
            yield _line(row, wall, steps)
    if small.seconds:
        yield _line(small, wall, steps)


def _line(row: Row, wall: float, steps: int) -> str:
    floor = of_floor = ""
    if row.floor_seconds:
        floor, of_floor = f"{1e3 * row.floor_seconds / steps:.3f}", f"{row.floor_seconds / row.seconds:.0%}"
    count = f"{row.count / steps:.1f}" if row.count else ""
    name = row.name.replace("|", "\\|")
    return f"| {name} | {count} | {1e3 * row.seconds / steps:.3f} | {row.seconds / wall:.1%} | {floor} | {of_floor} |"


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
