"""Owns the tests that every Triton kernel compiles for every GPU it is meant for, and that bad ones are found.
Does not know any op: other processes compile, because this one interprets kernels (conftest.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servd_kernels import static
from servd_kernels.triton_support import ARCHITECTURES

ROOT = Path(__file__).parents[2]
CASES_PER_OP = 3  # of each architecture: all of them are for `bench/kernels.py --static`


def run(arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT / 'kernels'}", "TRITON_CACHE_DIR": str(folder), **variables}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def reports(cache: Path) -> list[dict[str, Any]]:
    """What `bench/kernels.py --static` writes for a few cases of each op."""
    target = cache / "static.json"
    command = ["bench/kernels.py", "--static", f"--limit={CASES_PER_OP}", f"--json={target}"]
    done = run(command, cache)
    assert target.exists(), done.stderr
    found: list[dict[str, Any]] = json.loads(target.read_text())
    assert done.returncode == int(any(report["problems"] for report in found))
    assert done.stdout.count("\n") == len(found) + 2, "a Markdown row for each, and the head"
    return found


@pytest.fixture(scope="module")
def faults(cache: Path) -> dict[tuple[str, str], dict[str, Any]]:
    done = run(["tests/kernels/static_faults.py"], cache)
    assert done.returncode == 0, done.stderr
    return {(report["case"], report["architecture"]): report for report in json.loads(done.stdout)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", static.triton_ops())
def test_compiles_without_spills_and_with_tensor_cores(
    reports: list[dict[str, Any]], op: str, architecture: str
) -> None:
    found = [report for report in reports if (report["op"], report["architecture"]) == (op, architecture)]
    assert found, "compile_cases() has none for this architecture"
    assert {report["case"]: report["problems"] for report in found if report["problems"]} == {}
    assert all(report["registers"] > 0 and report["code_bytes"] > 0 for report in found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spills_and_errors_are_found(faults: dict[tuple[str, str], dict[str, Any]], architecture: str) -> None:
    spill = faults["spill", architecture]
    assert spill["spilled_bytes"] > 0
    assert f"spills {spill['spilled_bytes']} bytes a thread" in spill["problems"]
    assert faults["error", architecture]["problems"] == [
        "CompilationError: NameError('no_such_function is not defined')"
    ]


@pytest.mark.parametrize(("architecture", "limit"), [("sm_80", 166_912), ("gfx942", 65_536)])
def test_too_much_shared_memory_is_found(
    faults: dict[tuple[str, str], dict[str, Any]], architecture: str, limit: int
) -> None:
    report = faults["shared memory", architecture]
    assert report["shared_bytes"] > limit
    assert any(f"allowed: {limit}" in problem for problem in report["problems"])


@pytest.mark.parametrize(
    ("architecture", "kind"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")]
)
def test_tensor_core_instructions_are_named(
    faults: dict[tuple[str, str], dict[str, Any]], architecture: str, kind: str
) -> None:
    assert list(faults["dot of bfloat16", architecture]["tensor_core"]) == [kind]
    assert faults["dot of bfloat16", architecture]["problems"] == []
    outside = "its dot runs outside the tensor cores" in faults["dot of float32", architecture]["problems"]
    assert outside == (architecture != "gfx942"), "NVIDIA's have no float32; AMD's do"


def test_interpreted_kernels_are_refused(tmp_path: Path) -> None:
    done = run(["bench/kernels.py", "--static"], tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize(("option", "known"), [("--op=matmul", "rms_norm"), ("--arch=sm_20", "gfx942")])
def test_unknown_names_are_answered_with_the_known(option: str, known: str, tmp_path: Path) -> None:
    done = run(["bench/kernels.py", "--static", option], tmp_path)
    assert done.returncode == 2 and known in done.stderr.splitlines()[-1]
