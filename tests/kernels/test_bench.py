"""Owns the tests of the benchmark: what it measures, shows and writes.
Does not know how fast anything is: timing never stands in a test."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from servd_kernels import bench, native, op_names
from servd_kernels.floor import Floor

ROOT = Path(__file__).parents[2]
FLOOR = Floor(read_gbps=10.0, copy_gbps=20.0, flops={"float32": 1e12, "float16": 1e12, "bfloat16": 2e12, "int8": 4e12})


class CountedStand:
    """A clock on which each call takes a microsecond more than the one before."""

    device = "cpu"
    rotating_bytes = 4000

    def __init__(self) -> None:
        self.now = 0

    def describe(self) -> str:
        return "a clock"

    def floor(self) -> Floor:
        return FLOOR

    def time(self, calls: Iterator[bench.Call], seconds: float) -> list[float]:
        times = []
        for call in itertools.islice(calls, 5):
            call()
            self.now += 1
            times.append(self.now * 1e-6)
        return times


def counting_case(bytes_moved: int, flops: int = 0) -> tuple[bench.Case, list[str]]:
    """A case and the log of its calls."""
    log: list[str] = []

    def make(index: int) -> tuple[bench.Call, bench.Call]:
        return lambda: log.append(f"ours {index}"), lambda: log.append(f"theirs {index}")

    return bench.Case("a case", make, bytes_moved, flops, "bfloat16"), log


def test_ours_and_theirs_take_turns_over_rotating_buffers() -> None:
    case, log = counting_case(bytes_moved=1000)
    timing = bench.time_case(case, CountedStand())
    ours = [f"ours {i}" for i in (0, 1, 2, 3, 4, 0, 1, 2, 3, 4)]
    assert log[:5] == ours[:5] and log[10:15] == ours[5:], "4000 bytes to rotate: five copies"
    assert log[5:10] == [line.replace("ours", "theirs") for line in ours[:5]]
    assert len(log) == 40
    # Of 1..5, 11..15, 21..25, 31..35 and of the numbers between, in microseconds.
    assert timing.ours == pytest.approx([5e-6, 21e-6, 32e-6])
    assert timing.theirs == pytest.approx([10e-6, 26e-6, 37e-6])


def test_figures_and_their_lines() -> None:
    case, _ = counting_case(bytes_moved=10_000, flops=8_000_000)
    timing = bench.Timing([4e-6, 5e-6, 6e-6], [9e-6, 10e-6, 11e-6], FLOOR.seconds(10_000, 8_000_000, "bfloat16"))
    row = bench.figures("gelu", case, timing)
    assert row["floor_us"] == pytest.approx(4.0) and row["floor_share"] == pytest.approx(0.8)
    assert (row["gb_per_s"], row["gflop_per_s"]) == pytest.approx((2.0, 1600.0))
    assert row["times_torch"] == pytest.approx(2.0)
    expected = "| gelu | a case | 4.0 | 5.0 | 6.0 | 2.0 | 1600.0 | 4.0 | 80% | 10.0 | 2.00 |\n"
    assert bench.show_row(row, is_table=True) == expected
    assert bench.show_row(row, is_table=False).split() == expected.replace("|", "").split()
    heads = [bench.show_head(is_table=True).count("|"), bench.show_row(row, is_table=True).count("|")]
    assert heads == [2 * 12, 12]


def test_a_case_without_operations_has_no_rate() -> None:
    case, _ = counting_case(bytes_moved=10_000)
    row = bench.figures("gelu", case, bench.Timing([1e-6] * 3, [1e-6] * 3, 1e-6))
    assert row["gflop_per_s"] is None
    assert " - " in bench.show_row(row, is_table=True)


@pytest.mark.parametrize("op", op_names())
def test_the_smallest_case_of_each_op_runs(op: str) -> None:
    cases = bench.cases_of(op, "cpu")
    assert len({case.name for case in cases}) == len(cases) > 0, "names tell cases apart"
    smallest = min(cases, key=lambda case: (case.flops, case.bytes))
    timing = bench.time_case(smallest, CountedStand())
    assert timing.floor > 0 and len(timing.ours) == len(timing.theirs) == 3


def test_cases_are_chosen_by_their_name() -> None:
    assert [case.name for case in bench.cases_of("gelu", "cpu", "32x1536 bfloat16 tanh to int8")] == [
        "32x1536 bfloat16 tanh to int8"
    ]
    with pytest.raises(ValueError, match="unknown op 'matmul'; known: .*rms_norm"):
        bench.cases_of("matmul", "cpu")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, "bench/kernels.py", "--device=cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(native.library() is None, reason="the floor is measured by native code")
def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    target = tmp_path / "kernels.json"
    done = run("--op=rms_norm", "--only=32x576 float32", "--seconds=0.01", "--threads=1", "--table", f"--json={target}")
    assert done.returncode == 0, done.stderr
    machine, blank, *table = done.stdout.splitlines()
    assert f"torch {torch.__version__}" in machine and "1 threads" in machine and "peak GFLOP/s" in machine
    assert blank == "" and len(table) == 4 and all(line.startswith("|") for line in table)
    written = json.loads(target.read_text())
    assert written["machine"] == machine
    assert [row["case"] for row in written["cases"]] == ["32x576 float32", "32x576 float32 + residual"]
    assert all(row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in written["cases"])


def test_wrong_names_are_answered_with_the_known() -> None:
    done = run("--op=matmul")
    assert done.returncode == 2 and "known: " in done.stderr and "rms_norm" in done.stderr
