"""Steps replayed from recordings: the same tokens and the same cache as without, whatever comes and goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from servd_kernels import native
from torch import Tensor

from servd.attention.kv_dtype import KVCacheDtype
from servd.attention.metadata import AttentionMetadata
from servd.models.loader import load_model
from servd.worker.kv_cache import PagedKVCache
from servd.worker.model_runner import ModelRunner
from servd.worker.recorded_steps import RecordedSteps
from tests.unit.worker.driver import Driver
from tests.unit.worker.tiny_llama import write_tiny_llama

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.missing_reason()))

CPU = torch.device("cpu")
MAX_SEQS, MAX_LEN, MAX_TOKENS = 12, 96, 64


class Runner:
    """A real model; `forwards` counts how often Python ran its layers, recording aside."""

    def __init__(self, folder: Path, *, recorded: bool, kv: str = "auto", is_native: bool = True) -> None:
        folder.mkdir(exist_ok=True)
        model = load_model(write_tiny_llama(folder), dtype="float32", device="cpu")
        self.cache = PagedKVCache(model.bind_kv_cache(KVCacheDtype(kv, kv, block_size=4)), 200, CPU)
        for layer in self.cache.layers:
            layer[1:] = 0xFF
        self.forwards = 0
        run_layers = model.forward

        def forward(ids: Tensor, positions: Tensor, metadata: AttentionMetadata, caches: list[Tensor]) -> Tensor:
            self.forwards += 1
            hidden = run_layers(ids, positions, metadata, caches)
            return hidden if is_native else hidden + 0

        model.forward = forward  # type: ignore[method-assign]
        self.steps = RecordedSteps(
            forward, self.cache.layers, max_tokens=MAX_TOKENS, max_num_seqs=MAX_SEQS, max_blocks=MAX_LEN // 4
        )
        self.forwards = 0
        self.runner = ModelRunner(
            model, self.cache, max_num_seqs=MAX_SEQS, max_model_len=MAX_LEN, device=CPU,
            replay=self.steps if recorded else None,
        )  # fmt: skip
        self.driver = Driver(self.runner.execute, block_size=4)

    def run_mixed(self) -> dict[str, list[int]]:
        """Requests of several lengths that come and go, so that shapes of steps change and come again."""
        for i in range(5):
            self.driver.add(f"r{i}", [(7 * i + j) % 300 for j in range(3 + 11 * i)], seed=i, temperature=0.8)
        for step in range(24):
            if step == 8:
                self.driver.finish("r1")
            if step == 12:
                for i in range(5, 9):
                    self.driver.add(f"r{i}", [i, i + 1, i + 2], seed=i)
            self.driver.step_all()
        return {name: sequence.output for name, sequence in self.driver.sequences.items()}


@pytest.mark.parametrize("kv", ["auto", "int8", "int4"])
def test_same_tokens_and_same_cache_as_without(tmp_path: Path, kv: str) -> None:
    plain, recorded = (Runner(tmp_path / str(on), recorded=on, kv=kv) for on in (False, True))
    assert recorded.run_mixed() == plain.run_mixed()
    for ours, theirs in zip(recorded.cache.layers, plain.cache.layers, strict=True):
        assert torch.equal(ours, theirs)  # the null block and unwritten slots included
    assert recorded.forwards == 1  # the first step is longer than MAX_TOKENS
    assert plain.forwards > 20


def test_a_model_that_computes_in_torch_runs_as_usual(tmp_path: Path) -> None:
    plain, other = Runner(tmp_path / "a", recorded=False), Runner(tmp_path / "b", recorded=True, is_native=False)
    assert not other.steps.is_recorded
    assert other.run_mixed() == plain.run_mixed()


def test_a_step_with_a_fault_is_left_to_the_usual_way(tmp_path: Path) -> None:
    """Which says what is wrong."""
    runner = Runner(tmp_path, recorded=True)
    runner.driver.add("r", [1, 2, 3])
    plan = runner.driver.plan({"r": 0})
    runner.runner.batch.apply(plan)
    packed = runner.runner.batch.pack(plan.scheduled)
    packed.positions[1] = 10**6
    with torch.inference_mode():
        assert runner.steps.run(packed) is None
        packed.positions[1] = 1
        assert runner.steps.run(packed) is not None
