"""The profiler: spans add up, every recorded function exists, ops get their costs, rows and drawings say it all."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.profiling import points
from bench.profiling.account import Account, Kernels, Row, front_rows, kernels_of, steps_of, worker_rows
from bench.profiling.show import flame_graph, table
from bench.profiling.spans import Recorder, difference
from tests.unit.eval.tiny_tokenizer import write_byte_tokenizer
from tests.unit.worker.tiny_llama import write_tiny_llama

ROOT = Path(__file__).parents[3]


def ticking() -> Recorder:
    """A recorder whose clock advances by one at each look."""
    return Recorder(itertools.count(1).__next__)


def child(tree: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        tree = next(node for node in tree["children"] if node["name"] == name)
    return tree


def test_spans_nest_and_count() -> None:
    recorder = ticking()
    inner = recorder.wrapped("inner", lambda: None)
    outer = recorder.wrapped("outer", lambda: (inner(), inner()))
    outer()
    inner()
    tree = recorder.snapshot()
    assert [child(tree, "outer")[key] for key in ("count", "total_ns")] == [1, 5]
    assert [child(tree, "outer", "inner")[key] for key in ("count", "total_ns")] == [2, 2]
    assert child(tree, "inner")["count"] == 1


def test_a_failing_call_closes_its_span() -> None:
    recorder = ticking()
    with pytest.raises(ZeroDivisionError):
        recorder.wrapped("bad", lambda: 1 / 0)()
    recorder.wrapped("next", lambda: None)()
    assert child(recorder.snapshot(), "next")["count"] == 1


def test_a_snapshot_holds_the_span_that_runs_up_to_now() -> None:
    recorder = ticking()
    seen: list[dict[str, Any]] = []
    recorder.wrapped("long", lambda: seen.append(recorder.snapshot()))()
    assert child(seen[0], "long")["total_ns"] == 1
    later = recorder.snapshot()
    assert child(difference(later, seen[0]), "long") == {**child(later, "long"), "total_ns": 1}


@pytest.mark.parametrize("target", [target for _, target in (*points.WORKER, *points.FRONT)])
def test_what_is_recorded_exists(target: str) -> None:
    module, _, path = target.partition(":")
    code = f"import importlib, operator; operator.attrgetter({path!r})(importlib.import_module({module!r}))"
    exec(code, {})  # raises if a rename has made the profile blind there


def test_a_function_that_is_gone_is_told() -> None:
    assert not Recorder().wrap("x", "servd.engine.core:EngineCore.no_such_thing")
    assert not Recorder().wrap("x", "servd.no_such_module:f")


RECORD_OPS = """
import json, torch
from bench.profiling.ops import record_natives, record_ops
from bench.profiling.spans import Recorder
recorder = Recorder()
record_natives(recorder)
record_ops(recorder)
from servd_kernels import linear, rms_norm
op = linear.OP.bind("cpu", torch.bfloat16)
packed = op.pack(torch.randn(96, 64, dtype=torch.bfloat16))
op(torch.randn(5, 64, dtype=torch.bfloat16), packed)
packed.run(torch.randn(1, 64, dtype=torch.bfloat16), packed)
rms_norm.OP.bind("cpu", torch.float32)(torch.randn(3, 64), torch.ones(64), 1e-5)
print(json.dumps(recorder.snapshot()))
"""


def test_ops_are_recorded_by_shape_with_bytes_and_operations() -> None:
    output = subprocess.run([sys.executable, "-c", RECORD_OPS], cwd=ROOT, capture_output=True, text=True, check=True)
    tree = json.loads(output.stdout)
    linear = child(tree, "linear ≤8 x 64 → 96")
    ((moved, operations, unit, count),) = linear["costs"]
    assert moved >= 2 * (96 * 64 + 5 * (64 + 96))
    assert (operations, unit, count) == (2 * 5 * 64 * 96, "bfloat16", 1)
    assert child(linear, "native linear")["count"] == 1
    assert child(tree, "linear 1 x 64 → 96")["count"] == 1  # by the packed weight's own function
    assert child(tree, "rms_norm ≤8 x 64", "native rms_norm")["count"] == 1


class HalfSecond:
    """Limits by which every call needs half a second."""

    def seconds(self, moved: int, operations: int = 0, dtype: str = "float32") -> float:
        return 0.5


def node(name: str, seconds: float, *children: dict[str, Any], costs: Any = (), count: int = 1) -> dict[str, Any]:
    total = int(seconds * 1e9)
    return {"name": name, "count": count, "total_ns": total, "costs": list(costs), "children": list(children)}


OP = node("linear 1 x 2 → 3", 3, node("native linear", 2), costs=[[10, 20, "float32", 1]])
WORKER = node("", 0, node("wire: receive", 2, node("idle", 1.5)), node("step", 5, node("forward", 4, OP)))


def test_every_second_of_the_worker_is_in_one_row() -> None:
    rows = {row.name: row.seconds for row in worker_rows(WORKER, HalfSecond())}
    assert rows == {
        "linear 1 x 2 → 3": 2.0,
        "idle": 1.5,
        "step: Python and torch between its parts": 1.0,
        "forward: Python and torch between its parts": 1.0,
        "forward: Python within ops": 1.0,
        "wire: receive": 0.5,
    }
    assert steps_of(WORKER) == 1


def test_parts_and_ops_are_summed_up() -> None:
    rows = [Row("linear 1 x 2 → 3", 2, 2.0, 0.5), Row("linear ≤8 x 2 → 3", 1, 3.0, 1.0)]
    assert Kernels(1.0, 3, rows).by_op == [Row("linear", 3, 5.0, 1.5)]
    assert Kernels(1.0, 3, rows).floor_a_step == 0.5
    wire = [Row("wire: send", 1, 0.5), Row("wire: receive", 1, 0.25)]
    assert Account(8, 6.0, 1, 10, wire, [], {}, 0.0).parts == [Row("wire", 2, 0.75)]


def test_the_front_is_its_processor_time_and_its_wait() -> None:
    rows = front_rows(node("", 0, node("plan: fill", 1)), thread_seconds=3.0, wall=7.0)
    assert [(row.name.split(":")[0], row.seconds) for row in rows] == [("http", 2.0), ("plan", 1.0), ("idle", 4.0)]


def account(wall: float) -> Account:
    kernels = kernels_of(WORKER, HalfSecond(), rate=1.0)
    front = [Row("plan", 1, 0.1)]
    return Account(8, wall, 1, 10, worker_rows(WORKER, None), front, {"worker": 1.0}, 0.0, kernels=kernels)


def test_parts_must_add_up_to_the_wall() -> None:
    assert account(7.2).agrees and "agrees with the wall within 5%" in table(account(7.2))
    assert not account(7.5).agrees and "DOES NOT AGREE" in table(account(7.5))


def test_an_op_is_shown_with_its_floor() -> None:
    shown = table(account(7.0))
    assert "| linear 1 x 2 → 3 | 1.0 | 2000.000 | 100.0% | 500.000 | 25% |" in shown
    assert "would take 500.00 ms, 7% of the wall" in shown


def test_the_flame_graph_is_a_picture_of_the_tree() -> None:
    picture = ElementTree.fromstring(flame_graph("a < b & c", {"worker": WORKER}, wall=7.0))
    widths = {
        group[0].text.split(":")[0]: float(group[1].attrib["width"])  # type: ignore[union-attr]
        for group in picture.iter("{http://www.w3.org/2000/svg}g")
    }
    assert widths["worker"] == pytest.approx(1200, abs=1)
    assert widths["step"] / widths["worker"] == pytest.approx(5 / 7, abs=0.01)
    assert widths["native linear"] < widths["linear 1 x 2 → 3"]


def test_a_server_under_load_is_profiled_op_by_op(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny_llama(folder)
    write_byte_tokenizer(folder)
    out = tmp_path / "out.json"
    flags = ["--concurrency", "2", "--requests", "4", "--json", str(out), "--flame", str(tmp_path), "--port", "0"]
    command = [sys.executable, "bench/profile.py", *flags, str(folder), "--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "### 2 at a time" in done.stdout, done.stderr
    (run,) = json.loads(out.read_text())["runs"]
    assert {"idle", "pack: arrays", "sample", "wire: decode"} <= {row["name"] for row in run["worker"]}
    assert "linear ≤8 x 64 → 96 gated" in {row["name"] for row in run["kernels"]["rows"]}
    assert {"plan: schedule", "output"} <= {row["name"] for row in run["front"]}
    assert run["output_tokens"] > 4 and run["steps"] > 4
    assert ElementTree.parse(tmp_path / "profile-c2.svg").getroot().tag.endswith("svg")
