"""The growth curves: costs counted from the weights, and the whole command on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.profiling.costs import model_cost
from servd.models.loader import load_model
from tests.unit.eval.tiny_tokenizer import write_byte_tokenizer
from tests.unit.worker import tiny_llama

ROOT = Path(__file__).parents[3]


def test_a_models_cost_is_that_of_its_matrices(tmp_path: Path) -> None:
    model = load_model(tiny_llama.write_tiny_llama(tmp_path), dtype="float32", device="cpu")
    cost = model_cost(model)
    hidden, inner = tiny_llama.HIDDEN, tiny_llama.INTERMEDIATE
    layer = 2 * hidden * hidden + hidden * hidden + 3 * hidden * inner  # q and o, k and v of half the heads each
    assert cost.operations == {"float32": 2 * layer * tiny_llama.LAYERS}
    assert cost.head_operations == {"float32": 2 * hidden * tiny_llama.VOCAB_SIZE}
    assert cost.weight_bytes >= 4 * (layer * tiny_llama.LAYERS + hidden * tiny_llama.VOCAB_SIZE)
    assert cost.attention_operations == 4 * hidden * tiny_llama.LAYERS
    assert cost.seconds(3, 1, {"float32": 2.0}) == 3 * layer * tiny_llama.LAYERS + hidden * tiny_llama.VOCAB_SIZE


@pytest.mark.parametrize("quantization", ["w8a8", "w4a8", "w4a16", "int8"])
def test_all_weights_count_however_they_are_held(tmp_path: Path, quantization: str) -> None:
    folder = tiny_llama.write_tiny_llama(tmp_path)
    plain = model_cost(load_model(folder, dtype="float32", device="cpu"))
    coded = model_cost(load_model(folder, dtype="float32", device="cpu", quantization=quantization))
    assert sum(coded.operations.values()) == sum(plain.operations.values())
    assert sum(coded.head_operations.values()) == sum(plain.head_operations.values())
    assert coded.weight_bytes < plain.weight_bytes


def test_the_command_measures_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_llama.write_tiny_llama(folder)
    write_byte_tokenizer(folder)
    out = tmp_path / "out"
    command = [sys.executable, "bench/growth.py", str(folder), "--quick", "--out", str(out), "--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    xs = {"concurrency": {1, 2}, "context": {16, 32}, "prompt": {16, 32}, "threads": {1, 2}}
    for name, expected in xs.items():
        points = json.loads((out / f"growth-{name}.json").read_text())["points"]
        assert {point["x"] for point in points} == expected
        assert all(point["tokens_per_s"] > 0 and point["memory_limit"] > 0 for point in points)
        assert ElementTree.parse(out / f"growth-{name}.svg").getroot().tag.endswith("svg")


def test_places_can_be_chosen(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_llama.write_tiny_llama(folder)
    write_byte_tokenizer(folder)
    command = [sys.executable, "bench/growth.py", str(folder), "--quick", "--out", str(tmp_path), "--dtype", "float32"]
    done = subprocess.run([*command, "--only=prompt", "--at=24", "--at=8"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "growth-prompt.json").read_text())["points"]
    assert [point["x"] for point in points] == [8, 24]
    done = subprocess.run([*command, "--at=0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--at is 0; allowed: at least 1" in done.stderr
