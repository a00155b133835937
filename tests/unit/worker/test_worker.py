"""A worker with a real, tiny Llama: sizes and errors at start, and the same tokens in company as alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from servd_kernels import native

from servd.config import EngineConfig
from servd.errors import ConfigError
from servd.hub import ModelFiles
from servd.worker.worker import Worker
from tests.unit.worker.driver import Driver, Sequence
from tests.unit.worker.tiny_llama import LAYERS, MAX_POSITIONS, VOCAB_SIZE, write_tiny_llama

BLOCK = 8
BLOCK_BYTES_FLOAT32 = LAYERS * 2 * 2 * BLOCK * 16 * 4  # layers, K and V, KV heads, slots, head_dim, bytes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def make_worker(files: ModelFiles, **settings: Any) -> Worker:
    defaults = {"device": "cpu", "block_size": BLOCK, "max_num_seqs": 8, "threads": 2}
    return Worker(EngineConfig.from_flat(**defaults | settings).resolve(), files)


def make_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def test_info_tells_what_the_engine_must_know(files: ModelFiles) -> None:
    worker = make_worker(files, kv_cache_memory=100 * BLOCK_BYTES_FLOAT32 + 5)
    info = worker.info()
    assert (info.device, info.dtype, info.num_blocks, info.block_bytes) == ("cpu", "float32", 100, BLOCK_BYTES_FLOAT32)
    assert info.kernel_backend.split()[0] in ("cpu", "reference")
    assert worker.max_model_len == MAX_POSITIONS


def test_the_cache_is_no_larger_than_the_requests_can_fill(files: ModelFiles) -> None:
    assert make_worker(files).info().num_blocks == 8 * (MAX_POSITIONS // BLOCK) + 1
    assert make_worker(files, max_model_len=20).info().num_blocks == 8 * 3 + 1
    assert make_worker(files, dtype="bfloat16").info().block_bytes == BLOCK_BYTES_FLOAT32 // 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": MAX_POSITIONS + 1}, r"^--max-model-len is 129; allowed: at most the model's 128$"),
        ({"kv_cache_memory": 16 * BLOCK_BYTES_FLOAT32}, "--kv-cache-memory .*lower --max-model-len to 120"),
        ({"kv_cache_dtype": "int3"}, "--kv-cache-dtype is 'int3'; allowed: auto, .*int4"),
    ],
)
def test_settings_that_cannot_work_are_named(files: ModelFiles, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_worker(files, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_named(files: ModelFiles) -> None:
    with pytest.raises(ConfigError, match="--device is cuda"):
        make_worker(files, device="cuda")


@pytest.mark.skipif(native.library() is None, reason=str(native.missing_reason()))
@pytest.mark.parametrize("replay_steps", [True, False])
def test_steps_run_the_layers_in_python_only_where_nothing_is_replayed(files: ModelFiles, replay_steps: bool) -> None:
    worker = make_worker(files, replay_steps=replay_steps)
    forward, calls = worker.model.forward, 0

    def count(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(*args)

    worker.model.forward = count  # type: ignore[method-assign]
    driver = Driver(worker.execute, BLOCK)
    driver.add("a", make_prompt(1, 5))
    for _ in range(3):
        driver.step_all()
    assert calls == (0 if replay_steps else 3)


def test_loading_is_reported(files: ModelFiles) -> None:
    seen: list[tuple[str, int, int]] = []
    config = EngineConfig.from_flat(device="cpu", block_size=BLOCK).resolve()
    Worker(config, files, lambda what, done, total: seen.append((what, done, total)))
    assert seen[-1][1] == seen[-1][2] > 0


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.8, "seed": 11},
    "nucleus": {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": 12},
    "penalized": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "seed": -13},
    "verbose": {"temperature": 1.0, "min_p": 0.05, "logprobs": 4, "prompt_logprobs": 2, "seed": 14},
}
LENGTHS = {"greedy": 37, "warm": 3, "nucleus": 21, "penalized": 16, "verbose": 29}


def run_alone(worker: Worker, name: str, num_tokens: int) -> Sequence:
    driver = Driver(worker.execute, BLOCK)
    sequence = driver.add(name, make_prompt(LENGTHS[name], LENGTHS[name]), **REQUESTS[name])
    for _ in range(num_tokens):
        driver.step({name: 0})
    driver.finish(name)
    worker.execute(driver.plan({}))
    return sequence


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_do_not_depend_on_company_chunks_preemption_or_forks(files: ModelFiles, dtype: str, seed: int) -> None:
    worker = make_worker(files, dtype=dtype, max_num_seqs=10)
    driver, rng = Driver(worker.execute, BLOCK), random.Random(seed)
    for name in REQUESTS:
        driver.add(name, make_prompt(LENGTHS[name], LENGTHS[name]), **REQUESTS[name])
    fork = None
    while min(len(s.output) for s in driver.sequences.values()) < 8:
        names = rng.sample(sorted(driver.sequences), rng.randint(1, len(driver.sequences)))
        names = [name for name in names if len(driver.sequences[name].output) < 16] or names[:1]
        for name in names:
            if driver.sequences[name].is_known and rng.random() < 0.1:
                driver.preempt(name)
        changes: dict[str, Any] = {}
        greedy = driver.sequences["greedy"]
        if fork is None and greedy.num_computed == len(greedy.prompt):
            fork = driver.add("fork", greedy.prompt, temperature=1.0, seed=99)
            own = driver.new_block()
            fork.blocks, fork.num_computed = list(greedy.blocks[: -(-37 // BLOCK)]), 36
            changes["block_copies"] = [(fork.blocks[-1], own)]
            changes["replaced_blocks"] = [("fork", len(fork.blocks) - 1, own)]
            names.append("fork")
        driver.step({name: rng.choice([0, 1, 5, 13]) for name in names}, **changes)
    together = dict(driver.sequences)
    for name in list(driver.sequences):
        driver.finish(name)
    worker.execute(driver.plan({}))
    assert fork is not None
    for name in REQUESTS:
        expected = run_alone(worker, name, len(together[name].output))
        assert together[name].output == expected.output, name
    alone = Driver(worker.execute, BLOCK)
    lonely = alone.add("lonely", fork.prompt, temperature=1.0, seed=99)
    for _ in fork.output:
        alone.step({"lonely": 0})
    assert fork.output == lonely.output


def test_logprobs_have_the_same_bits_in_company_and_in_chunks(files: ModelFiles) -> None:
    worker = make_worker(files)
    alone = run_alone(worker, "verbose", 4)
    driver = Driver(worker.execute, BLOCK)
    for name in REQUESTS:
        driver.add(name, make_prompt(LENGTHS[name], LENGTHS[name]), **REQUESTS[name])
    driver.step({"greedy": 20, "verbose": 7})
    driver.step({"verbose": 11, "warm": 0, "greedy": 0})
    for _ in range(5):
        driver.step(dict.fromkeys(REQUESTS, 0))
    together = driver.sequences["verbose"]

    def logprobs(sequence: Sequence) -> list[Any]:
        return [output.logprobs["verbose"] for output in sequence.outputs if "verbose" in output.logprobs][:4]

    def prompt_logprobs(sequence: Sequence) -> list[Any]:
        return [entry for output in sequence.outputs for entry in output.prompt_logprobs.get("verbose", [])]

    assert logprobs(together) == logprobs(alone)
    assert prompt_logprobs(together) == prompt_logprobs(alone)
    assert [entry.token_id for entry in prompt_logprobs(alone)] == alone.prompt[1:]
