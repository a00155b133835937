"""Decode steps through padded, fixed buffers: the same bits as without, and nothing written by the padding.

No GPU is needed: the capture is a plain call, so that all but the recording itself is what runs on a card.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from servd.attention.kv_dtype import KVCacheDtype
from servd.attention.metadata import AttentionMetadata
from servd.models.loader import load_model
from servd.outputs import ModelRunnerOutput, SchedulerOutput
from servd.worker.cuda_graph import DecodeGraphs, Replay, batch_class, width_class
from servd.worker.kv_cache import PagedKVCache
from servd.worker.model_runner import ModelRunner
from tests.unit.worker.driver import Driver
from tests.unit.worker.tiny_llama import write_tiny_llama

CPU = torch.device("cpu")
MAX_SEQS, MAX_LEN = 12, 96


class Runner:
    """A real model, with or without graphs."""

    def __init__(self, folder: Path, *, graphs: bool) -> None:
        folder.mkdir(exist_ok=True)
        model = load_model(write_tiny_llama(folder), dtype="float32", device="cpu")
        cache = PagedKVCache(model.bind_kv_cache(KVCacheDtype(block_size=4)), 200, CPU)
        for layer in cache.layers:
            layer[1:] = 0xFF
        self.cache = cache
        self.captures = 0

        def capture(step: object) -> Replay:
            self.captures += 1
            assert callable(step)
            return step

        def forward(ids: Tensor, positions: Tensor, metadata: AttentionMetadata, caches: list[Tensor]) -> Tensor:
            self.rows = len(ids)
            return model.forward(ids, positions, metadata, caches)

        self.graphs = DecodeGraphs(
            forward, cache.layers, max_num_seqs=MAX_SEQS, max_blocks=MAX_LEN // 4, device=CPU, capture=capture
        )
        used = self.graphs if graphs else None
        self.runner = ModelRunner(
            model, cache, max_num_seqs=MAX_SEQS, max_model_len=MAX_LEN, device=CPU, replay=used
        )
        self.driver = Driver(self.execute, block_size=4)

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        return self.runner.execute(plan)


def run_mixed(runner: Runner) -> dict[str, list[int]]:
    """Requests of several lengths that come and go, so that batch sizes rise and fall."""
    driver = runner.driver
    for i in range(5):
        driver.add(f"r{i}", [(7 * i + j) % 300 for j in range(3 + 11 * i)], seed=i, temperature=0.8, logprobs=2)
    for step in range(12):
        if step == 4:
            driver.finish("r1")
        if step == 6:
            for i in range(5, 9):
                driver.add(f"r{i}", [i, i + 1, i + 2], seed=i)
        driver.step_all()
    return {name: sequence.output for name, sequence in driver.sequences.items()}


def test_same_tokens_and_same_cache_as_without_graphs(tmp_path: Path) -> None:
    plain, graphed = (Runner(tmp_path / str(graphs), graphs=graphs) for graphs in (False, True))
    assert run_mixed(graphed) == run_mixed(plain)
    for ours, theirs in zip(graphed.cache.layers, plain.cache.layers, strict=True):
        assert torch.equal(ours, theirs)  # the null block and unwritten slots included
    assert graphed.graphs.num_graphs == graphed.captures > 0


def test_a_class_is_captured_once(tmp_path: Path) -> None:
    runner = Runner(tmp_path, graphs=True)
    for i in range(3):
        runner.driver.add(f"r{i}", [i, 5, 9])
    for _ in range(6):
        runner.driver.step_all()
    assert runner.captures == 1 and runner.rows == 4


def test_steps_with_chunks_run_without_graphs(tmp_path: Path) -> None:
    runner = Runner(tmp_path, graphs=True)
    runner.driver.add("r", list(range(9)))
    runner.driver.step_all()
    assert runner.captures == 0


@pytest.mark.parametrize(("num_reqs", "rows"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (17, 24), (64, 64)])
def test_batch_classes(num_reqs: int, rows: int) -> None:
    assert batch_class(num_reqs) == rows


@pytest.mark.parametrize(("blocks", "width"), [(1, 16), (16, 16), (17, 32), (70, 100)])
def test_width_classes(blocks: int, width: int) -> None:
    assert width_class(blocks, 100) == width
