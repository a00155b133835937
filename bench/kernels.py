#!/usr/bin/env python3
"""Owns the command line of the kernels' benchmark: what runs here against the floor, or what compiles without a GPU.
Does not know how either is done (servd_kernels/bench.py, servd_kernels/static.py)."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", metavar="OP", help="this op alone; may be given again")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    timed = parser.add_argument_group("timing: p20/p50/p80, the share of the measured floor, the ratio to torch")
    timed.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    timed.add_argument("--threads", type=int, help="of the kernels and of torch; default: all cores")
    timed.add_argument("--seconds", type=float, default=0.3, help="for each side of each case; default: 0.3")
    timed.add_argument("--table", action="store_true", help="print a Markdown table")
    static = parser.add_argument_group("--static: compile the Triton kernels; exit 1 if one spills or the like")
    static.add_argument("--static", action="store_true", help="print a Markdown table of what they compile to")
    static.add_argument("--arch", action="append", metavar="ARCH", help="sm_80, sm_90, sm_100 or gfx942; default: all")
    static.add_argument("--workers", type=int, default=min(2, _usable_cores()), help="processes; default: up to 2")
    static.add_argument("--limit", type=int, help="at most so many cases an op and architecture, spread over its list")
    arguments = parser.parse_args()
    try:
        return _static(arguments) if arguments.static else _timed(arguments)
    except ValueError as error:
        parser.error(str(error))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _timed(arguments: argparse.Namespace) -> int:
    import torch
    from servd_kernels import bench, op_names, stands

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # All cases before the first is timed: a wrong name is told at once.
    chosen = [(op, bench.cases_of(op, device, arguments.only)) for op in arguments.op or op_names()]
    stand = stands.stand_for(device, arguments.threads)
    machine = stand.describe()
    _write(machine + "\n" + "\n" * arguments.table + bench.show_head(arguments.table))
    rows = []
    for op, cases in chosen:
        for case in cases:
            rows.append(bench.figures(op, case, bench.time_case(case, stand, arguments.seconds)))
            _write(bench.show_row(rows[-1], arguments.table))
    _write_json(arguments.json, {"machine": machine, "cases": rows})
    return 0


def _static(arguments: argparse.Namespace) -> int:
    from servd_kernels import static
    from servd_kernels.triton_support import ARCHITECTURES

    reports: list[static.Report] = []
    for report in static.compile_reports(
        arguments.op or static.triton_ops(),
        arguments.arch or ARCHITECTURES,
        arguments.workers,
        arguments.limit,
        arguments.only,
    ):
        if not reports:
            _write(static.table_head())
        reports.append(report)
        _write(static.table_row(report))
    _write_json(arguments.json, [dataclasses.asdict(report) for report in reports])
    return int(any(report.problems for report in reports))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_json(path: Path | None, content: object) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
