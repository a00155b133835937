"""`LLM` over a tiny Llama: interrupts, closing, threads, and errors that name one prompt of many."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers

from servd import LLM, SamplingParams
from servd.engine.llm import Generation
from servd.errors import ConfigError, EngineUnavailableError, InvalidRequestError, ServdError
from tests.unit.worker.tiny_llama import write_tiny_llama

GREEDY = SamplingParams(temperature=0.0, max_tokens=5)
LONG = SamplingParams(temperature=0.0, max_tokens=100)
SETTINGS = {"device": "cpu", "threads": 1, "max_num_seqs": 4, "max_num_queued_reqs": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_tiny_llama(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **SETTINGS) as llm:
        yield llm


def once_running(llm: LLM, act: Callable[[], object]) -> threading.Thread:
    def wait_and_act() -> None:
        while llm.engine.stats().running < 2:
            time.sleep(0.001)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def test_many_prompts_come_back_in_order(llm: LLM) -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    batch = llm.generate(prompts, GREEDY)
    assert [generation.prompt for generation in batch] == prompts
    assert [g.answers[0].token_ids for g in batch] == [llm.generate(p, GREEDY)[0].answers[0].token_ids for p in prompts]


def test_an_interrupt_ends_all_prompts_of_the_call_and_no_more(llm: LLM) -> None:
    # Python's own handler, as in a program: event loops of other tests may have left another.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = once_running(llm, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["x"] * 300, LONG)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(llm.generate("y", GREEDY)[0].answers[0].token_ids) == 5
    assert 'servd_requests_finished_total{reason="abort"}' in llm.engine.metrics.render().decode()


def test_closing_ends_calls_of_other_threads_with_an_error(model: Path) -> None:
    llm = LLM(model, **SETTINGS)
    thread = once_running(llm, llm.close)
    with pytest.raises(EngineUnavailableError, match="closed"):
        llm.generate(["x"] * 300, LONG)
    thread.join()


def test_use_after_close_says_so(model: Path) -> None:
    llm = LLM(model, **SETTINGS)
    llm.close()
    llm.close()
    with pytest.raises(EngineUnavailableError, match="the LLM is closed"):
        llm.generate("x", GREEDY)


def test_threads_share_the_queue(llm: LLM) -> None:
    found: dict[int, list[Generation]] = {}

    def work(i: int) -> None:
        found[i] = llm.generate([f"thread {i}, {k}" for k in range(12)], GREEDY)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]
    assert all(len(g.answers[0].token_ids) == 5 for generations in found.values() for g in generations)


@pytest.mark.parametrize("wrong", ["", "x" * 200, [1, 5.0], [True], [300], [-1], None])
def test_the_wrong_prompt_of_many_is_named(llm: LLM, wrong: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompts\[2\] ") as caught:
        llm.generate(["a", "b", wrong], GREEDY)  # type: ignore[list-item]
    assert caught.value.param == "prompts[2]"


@pytest.mark.parametrize("field", ["n", "best_of"])
def test_more_answers_than_the_queue_takes_are_refused_by_name(llm: LLM, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field} is 9; .*max-num-queued-reqs") as caught:
        llm.generate("a", SamplingParams(max_tokens=1, **{field: 9}))
    assert caught.value.param == field


@pytest.mark.parametrize(
    "settings, flag",
    [
        ({"scheduling_policy": "lottery"}, "scheduling policy"),
        ({"generation_config": "non"}, "--generation-config"),
        ({"dtype": "float8"}, "--dtype"),
        ({"max_num_seqs": "8"}, "--max-num-seqs"),
        ({"max_num_seqs": 2.5}, "--max-num-seqs"),
        ({"enable_prefix_caching": 1}, "--enable-prefix-caching"),
        ({"long_prefill_token_threshold": -5}, "--long-prefill-token-threshold"),
        ({"max_num_queued_reqs": 0}, "--max-num-queued-reqs"),
        ({"num_speculative_tokens": 33}, "--num-speculative-tokens is 33; allowed: 0 .off. to 32"),
        ({"max_worker_restarts": -1}, "--max-worker-restarts"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_a_wrong_setting_is_named(model: Path, settings: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        LLM(model, **settings)


def test_a_model_that_is_not_there_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ServdError):
        LLM(tmp_path / "gone")
    assert threading.active_count() == before


@pytest.mark.parametrize("executor", ["inproc", "multiproc"])
def test_an_llm_that_was_never_closed_leaves_the_interpreter_in_silence(model: Path, executor: str) -> None:
    code = (
        "from servd import LLM, SamplingParams\n"
        f"llm = LLM({str(model)!r}, executor={executor!r}, device='cpu', threads=1, max_num_seqs=2)\n"
        "assert len(llm.generate('hi', SamplingParams(max_tokens=3, ignore_eos=True))[0].answers[0].token_ids) == 3\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
