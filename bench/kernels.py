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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    static = parser.add_argument_group("--static: compile the Triton kernels; exit 1 if one spills or the like")
    static.add_argument("--static", action="store_true", help="print a Markdown table of what they compile to")
    static.add_argument("--arch", action="append", metavar="ARCH", help="sm_80, sm_90, sm_100 or gfx942; default: all")
    static.add_argument("--workers", type=int, default=_cores(2), help="processes that compile; default: up to 2")
    static.add_argument("--limit", type=int, help="at most so many cases an op and architecture, spread over its list")
    arguments = parser.parse_args()
    if arguments.static:
        return _static(parser, arguments)
    parser.error("only --static so far")


def _cores(most: int) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, usable)


def _static(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from servd_kernels import static
    from servd_kernels.triton_support import ARCHITECTURES

    reports = []
    try:
        sys.stdout.write(static.table_head())
        for report in static.compile_reports(
            arguments.op or static.triton_ops(), arguments.arch or ARCHITECTURES, arguments.workers, arguments.limit
        ):
            reports.append(report)
            sys.stdout.write(static.table_row(report))
            sys.stdout.flush()
    except ValueError as error:
        parser.error(str(error))
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(report) for report in reports], indent=1) + "\n")
    return int(any(report.problems for report in reports))


if __name__ == "__main__":
    sys.exit(main())
