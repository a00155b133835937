"""Pooled hidden states of a tiny Llama: as `transformers` has them, and the same bits in any chunks and company."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers

from servd.config import EngineConfig
from servd.hub import ModelFiles
from servd.outputs import ModelRunnerOutput
from servd.sampling_params import POOLINGS
from servd.worker.worker import Worker
from tests.unit.worker.driver import Driver
from tests.unit.worker.fake_model import NAN_TOKEN, make_runner
from tests.unit.worker.tiny_llama import HIDDEN, VOCAB_SIZE, write_tiny_llama

BLOCK = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def worker(request: pytest.FixtureRequest, files: ModelFiles) -> Worker:
    settings = {"device": "cpu", "block_size": BLOCK, "max_num_seqs": 8, "threads": 2, "dtype": request.param}
    return Worker(EngineConfig.from_flat(**settings).resolve(), files)


def make_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def make_driver(worker: Worker) -> Driver:
    for name in list(worker.runner.batch._row_of):
        worker.runner.batch.remove(name)
    return Driver(worker.execute, BLOCK)


def in_chunks(worker: Worker, prompt: list[int], pooling: str, chunks: list[int], others: int = 0) -> bytes:
    """The prompt's vector, computed in such chunks beside `others` that compute a chunk of their own in each step."""
    driver = make_driver(worker)
    for i in range(others):
        driver.add(f"other{i}", make_prompt(100 + i, 60), pooling=POOLINGS[i % 3], max_tokens=0)
    driver.add("a", prompt, pooling=pooling, max_tokens=0)
    output: ModelRunnerOutput | None = None
    for step, chunk in enumerate(chunks):
        shares = {f"other{i}": 3 + i for i in range(others) if step < 5}
        output = worker.execute(driver.plan(shares | {"a": chunk}))
    assert output is not None and output.failed == {} and list(output.embeddings) == ["a"]
    return output.embeddings["a"]


def test_vectors_are_those_of_transformers(files: ModelFiles) -> None:
    settings = {"device": "cpu", "block_size": BLOCK, "threads": 2, "dtype": "float32"}
    worker = Worker(EngineConfig.from_flat(**settings).resolve(), files)
    reference = transformers.AutoModel.from_pretrained(files.folder, dtype=torch.float32).eval()
    prompt = make_prompt(1, 45)
    with torch.inference_mode():
        hidden = reference(torch.tensor([prompt])).last_hidden_state[0].numpy()
    expected = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}
    for pooling in POOLINGS:
        found = np.frombuffer(in_chunks(worker, prompt, pooling, [45]), "<f4")
        assert found.shape == (HIDDEN,) == (worker.info().hidden_size,)
        np.testing.assert_allclose(found, expected[pooling], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_chunks_and_company_change_no_bit(worker: Worker, pooling: str) -> None:
    prompt = make_prompt(2, 37)
    alone = in_chunks(worker, prompt, pooling, [37])
    assert in_chunks(worker, prompt, pooling, [1, 7, 8, 20, 1]) == alone
    assert in_chunks(worker, prompt, pooling, [16, 21], others=6) == alone
    assert in_chunks(worker, prompt, pooling, [10, 10, 10, 7], others=3) == alone


def test_a_preempted_prompt_begins_again(worker: Worker) -> None:
    prompt = make_prompt(3, 30)
    alone = in_chunks(worker, prompt, "mean", [30])
    driver = make_driver(worker)
    driver.add("a", prompt, pooling="mean", max_tokens=0)
    worker.execute(driver.plan({"a": 11}))
    driver.preempt("a")
    worker.execute(driver.plan({"a": 13}))
    assert worker.execute(driver.plan({"a": 17})).embeddings["a"] == alone


def test_nothing_is_kept_of_prompts_that_are_dropped(worker: Worker) -> None:
    driver = make_driver(worker)
    for name in ("whole", "aborted"):
        driver.add(name, make_prompt(6, 12), pooling="mean", max_tokens=0)
    worker.execute(driver.plan({"whole": 12, "aborted": 5}))
    driver.finish("whole")
    driver.finish("aborted")
    driver.add("text", make_prompt(7, 5), temperature=0.0)
    driver.step({"text": 0})
    assert not {"whole", "aborted"} & set(worker.runner._pooler._pools)


def test_requests_that_sample_and_those_that_are_pooled_share_a_step(worker: Worker) -> None:
    driver = make_driver(worker)
    text = driver.add("text", make_prompt(4, 9), temperature=0.0)
    driver.add("vector", make_prompt(5, 9), pooling="last", max_tokens=0)
    output = driver.execute(_without_sample(driver, "vector"))
    assert output.request_ids == ["text"] and list(output.embeddings) == ["vector"]
    assert len(text.prompt) == 9


def _without_sample(driver: Driver, name: str):  # type: ignore[no-untyped-def]
    plan = driver.plan({"text": 0, "vector": 0})
    plan.scheduled.samples[plan.scheduled.request_ids.index(name)] = False  # as the scheduler has it: max_tokens is 0
    return plan


def test_a_vector_that_is_not_finite_fails_its_request_alone() -> None:
    runner = make_runner()
    original = runner.model.forward

    def forward(*args):  # type: ignore[no-untyped-def]
        hidden = original(*args)
        hidden[hidden[:, 1] > 0] = torch.nan
        return hidden

    runner.model.forward = forward  # type: ignore[method-assign]
    driver = Driver(runner.execute, 4)
    driver.add("bad", [5, NAN_TOKEN, 6], pooling="mean", max_tokens=0)
    driver.add("good", [5, 7, 6], pooling="mean", max_tokens=0)
    plan = driver.plan({"bad": 0, "good": 0})
    plan.scheduled.samples = [False, False]
    output = runner.execute(plan)
    assert "NaN" in output.failed["bad"] and list(output.embeddings) == ["good"]
