"""The shadow comparison: how often, what it reports, and that it leaves the request alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from servd.config import EngineConfig
from servd.errors import ConfigError
from servd.outputs import KVShadowSample
from servd.worker.worker import Worker
from tests.unit.worker.driver import Driver
from tests.unit.worker.tiny_llama import write_tiny_llama


def make_driver(folder: Path, **settings: Any) -> Driver:
    config = EngineConfig.from_flat(
        block_size=4, max_num_seqs=2, kv_cache_memory=1 << 22, dtype="float32", device="cpu", **settings
    )
    folder.mkdir(exist_ok=True)
    return Driver(Worker(config.resolve(), write_tiny_llama(folder)).execute, block_size=4)


def answer(folder: Path, **settings: Any) -> tuple[list[int], list[KVShadowSample]]:
    driver = make_driver(folder, **settings)
    sequence = driver.add("r", [5, 6, 7])
    for _ in range(8):
        driver.step_all()
    return sequence.output, [output.kv_shadow for output in sequence.outputs if output.kv_shadow is not None]


def test_half_of_the_steps_are_compared_and_the_answer_is_the_same(tmp_path: Path) -> None:
    alone, none = answer(tmp_path / "a", kv_cache_dtype="int8")
    tokens, samples = answer(tmp_path / "b", kv_cache_dtype="int8", kv_shadow_rate=0.5)
    assert none == [] and tokens == alone
    assert [sample.num_tokens for sample in samples] == [4, 6, 8, 10]
    assert all(0 <= sample.kl_divergence < 0.1 for sample in samples)


def test_int4_diverges_more_than_int8(tmp_path: Path) -> None:
    def divergence(name: str) -> float:
        _, samples = answer(tmp_path / name, kv_cache_dtype=name, kv_shadow_rate=1)
        return sum(sample.kl_divergence for sample in samples)

    assert 0 < divergence("int8") < divergence("int4")


def test_a_full_cache_that_is_stored_as_computed_is_exact(tmp_path: Path) -> None:
    _, samples = answer(tmp_path, kv_cache_dtype="float32", kv_shadow_rate=1)
    assert len(samples) == 8
    assert all(sample.kl_divergence == 0 and sample.is_top1_equal for sample in samples)


def test_the_row_that_is_compared_is_that_of_its_request_also_beside_guesses(tmp_path: Path) -> None:
    driver = make_driver(tmp_path, kv_cache_dtype="float32", kv_shadow_rate=1)
    driver.add("a", [5, 6, 7, 7], temperature=0.0, logit_bias={7: 100.0})  # goes on as it ends: guesses are made
    driver.add("b", [9, 8, 8, 8, 8], temperature=0.0, logit_bias={8: 100.0})
    driver.step_all()
    outputs = [driver.step({"a": 0, "b": 0}, num_drafts=3) for _ in range(6)]
    assert outputs[0].num_draft_tokens > 0
    samples = [output.kv_shadow for output in outputs]
    assert all(sample is not None and sample.kl_divergence == 0 for sample in samples)


def test_a_rate_without_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--kv-shadow-rate is 0.5 .*allowed: 0"):
        answer(tmp_path, kv_shadow_rate=0.5)
