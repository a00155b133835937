"""Constrained requests in the runner: whatever the steps look like, each gets the tokens that it gets alone."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from servd.outputs import ModelRunnerOutput, ScheduledRequests, SchedulerOutput
from servd.worker.forbidden_texts import ForbiddenTexts, TokenBytes, mask_of
from servd.worker.model_runner import ModelRunner
from tests.unit.worker.driver import Driver, Sequence
from tests.unit.worker.fake_model import NAN_TOKEN, FakeModel, make_runner
from tests.unit.worker.test_speculation import GivenDrafter, Guess, knowing

BLOCK = 4
EOS = 0
# Token i is CHARACTERS[i - 1]; token 13, which makes logits NaN, is one that no test asks for.
CHARACTERS = "abcdefghijkl~mnopqrstuvwxyz0123456789,:.{}[]-ABCDEF"
LETTERS = "[a-z]{5,20}"


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = {"<eos>": EOS} | {character: i + 1 for i, character in enumerate(CHARACTERS)}
    for pair in ("ab", "cd", "xy", "12"):
        vocabulary[pair] = len(vocabulary)
    merges = [(pair[0], pair[1]) for pair in ("ab", "cd", "xy", "12")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    backend.save(str(path))
    return path


def regex(pattern: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": f"start: /{pattern}/"}]})


class Bench:
    """A runner with a tokenizer, and what its tokens say."""

    def __init__(self, path: Path, guess: Guess | None = None, **options: Any) -> None:
        drafter = None if guess is None else GivenDrafter(guess)
        options.setdefault("num_blocks", 400)
        self.runner: ModelRunner = make_runner(
            block_size=BLOCK, tokenizer_path=path, drafter=drafter, max_model_len=128, **options
        )
        self.driver = Driver(self.runner.execute, BLOCK)
        self._backend = tokenizers.Tokenizer.from_file(str(path))

    def text(self, sequence: Sequence) -> str:
        return self._backend.decode(sequence.output)

    def run(self, *sequences: Sequence, num_drafts: int = 0, steps: int = 400) -> None:
        """Step until each has ended, as the engine would see it; what is sampled beyond the end is left in place."""
        for _ in range(steps):
            left = {s.request_id: 0 for s in sequences if not is_over(s)}
            if not left:
                return
            self.driver.step(left, num_drafts=num_drafts)
        raise AssertionError(f"{[s.output for s in sequences]} do not end")


def is_over(sequence: Sequence) -> bool:
    return EOS in sequence.output or len(sequence.output) >= (sequence.params.max_tokens or 10**6)


def until_end(sequence: Sequence) -> list[int]:
    end = sequence.output.index(EOS) + 1 if EOS in sequence.output else len(sequence.output)
    return sequence.output[:end]


def make_prompt(seed: int, length: int) -> list[int]:
    ids = [token for token in range(1, FakeModel.vocab_size) if token != NAN_TOKEN]
    return random.Random(seed).choices(ids, k=length)


def alone(path: Path, prompt: list[int], **options: Any) -> list[int]:
    bench = Bench(path)
    sequence = bench.driver.add("alone", prompt, **options)
    bench.run(sequence)
    return until_end(sequence)


REQUESTS: list[dict[str, Any]] = [
    {"guidance": regex(LETTERS), "seed": 1},
    {"guidance": regex("[0-9]{2}(,[0-9]{2}){0,6}"), "seed": 2},
    {"guidance": regex(LETTERS), "seed": 3, "min_tokens": 12, "logprobs": 2},
    {"seed": 4, "max_tokens": 12, "allowed_token_ids": (1, 2, 3, 50)},
    {"guidance": regex("[a-f]{4,12}"), "seed": 5, "bad_words": ("a", "bc"), "temperature": 0.5},
    {"seed": 6, "max_tokens": 10, "logit_bias": {NAN_TOKEN: -100.0}},
]


def test_each_gets_in_a_batch_what_it_gets_alone(tokenizer_path: Path) -> None:
    bench = Bench(tokenizer_path)
    sequences = [bench.driver.add(str(i), make_prompt(i, 3 + 5 * i), **one) for i, one in enumerate(REQUESTS)]
    bench.driver.step({"0": 0, "1": 3, "2": 2})  # some prompts in pieces
    bench.run(*sequences)
    for i, one in enumerate(REQUESTS):
        assert until_end(sequences[i]) == alone(tokenizer_path, make_prompt(i, 3 + 5 * i), **one)
    assert re.fullmatch(LETTERS, bench.text(sequences[0]))
    assert re.fullmatch("[0-9]{2}(,[0-9]{2}){0,6}", bench.text(sequences[1]))
    assert set(sequences[3].output) <= {1, 2, 3, 50}
    assert re.fullmatch("[b-f]{4,12}", bench.text(sequences[4])) and "bc" not in bench.text(sequences[4])


@settings(max_examples=25, deadline=None)
@given(
    chosen=st.lists(st.integers(0, len(REQUESTS) - 1), min_size=1, max_size=4, unique=True),
    wrong_at=st.sampled_from([lambda _: 99, lambda n: n % 3, lambda n: 0]),
    seed=st.integers(0, 999),
)
def test_with_guesses_preemptions_and_chunks_each_gets_what_it_gets_alone(
    tokenizer_path: Path, chosen: list[int], wrong_at: Callable[[int], int], seed: int
) -> None:
    rng = random.Random(seed)  # how many steps there are depends on how soon grammars are compiled
    prompts = {i: make_prompt(i, 2 + 3 * i) for i in chosen}
    expected = {i: alone(tokenizer_path, prompts[i], **REQUESTS[i]) for i in chosen}
    bench = Bench(tokenizer_path, knowing([prompts[i] + expected[i] for i in chosen], wrong_at))
    sequences = {str(i): bench.driver.add(str(i), prompts[i], **REQUESTS[i]) for i in chosen}
    for _ in range(300):
        left = [name for name, sequence in sequences.items() if not is_over(sequence)]
        if not left:
            break
        names = rng.sample(left, rng.randint(1, len(left)))
        if rng.random() < 0.1 and sequences[names[0]].is_known:
            bench.driver.preempt(names[0])
        bench.driver.step({name: rng.randint(0, 3) for name in names}, num_drafts=rng.randint(0, 4))
    assert {int(name): until_end(sequence) for name, sequence in sequences.items()} == expected


def test_what_a_grammar_forces_is_computed_in_one_step(tokenizer_path: Path) -> None:
    prompt, options = make_prompt(1, 6), {"guidance": regex("[0-9]abcdabcdabcd[0-9]"), "seed": 1}
    expected = alone(tokenizer_path, prompt, **options)
    bench = Bench(tokenizer_path, knowing([], lambda _: 99))  # no guesses but these
    a = bench.driver.add("a", prompt, **options)
    bench.run(a, num_drafts=7)
    assert until_end(a) == expected
    assert max(len(output.sampled_token_ids) for output in a.outputs) > 4
    assert sum(len(output.sampled_token_ids) > 0 for output in a.outputs) < len(expected)


def test_while_a_grammar_is_compiled_the_others_go_on_and_nothing_is_lost(tokenizer_path: Path) -> None:
    bench = Bench(tokenizer_path)
    ready = threading.Event()
    bench.runner.batch._guides._building.submit(ready.wait, 60)  # what compiles is busy with somebody else's
    slow = bench.driver.add("slow", make_prompt(1, 6), **REQUESTS[0])
    bench.driver.add("other", make_prompt(2, 9), **REQUESTS[5])
    for _ in range(10):
        output = bench.driver.step({"slow": 0, "other": 0})
        assert output.request_ids == ["other"] and not output.failed
    ready.set()
    bench.run(slow)
    assert until_end(slow) == alone(tokenizer_path, slow.prompt, **REQUESTS[0])


def test_constrained_requests_do_not_wait_for_the_grammar_of_another(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tokenizer_path)
    quick = bench.driver.add("quick", make_prompt(1, 6), **REQUESTS[3])
    while not quick.output:
        bench.driver.step({"quick": 0})
    ready = threading.Event()
    busy = bench.runner.batch._guides._building.submit(ready.wait, 5)
    bench.driver.add("slow", make_prompt(2, 6), **REQUESTS[0])
    monkeypatch.setattr("servd.worker.structured_output.PATIENCE_ALONE", 60)
    assert bench.driver.step({"quick": 0, "slow": 0}).request_ids == ["quick"]
    assert not busy.done()
    ready.set()


def test_a_mask_that_took_long_is_made_apart_the_next_time(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("servd.worker.structured_output.SLOW_SECONDS", 0)
    bench = Bench(tokenizer_path)
    slow = bench.driver.add("slow", make_prompt(1, 6), **REQUESTS[0])
    while not slow.output:
        bench.driver.step({"slow": 0})
    ready = threading.Event()
    bench.runner.batch._guides._slow.submit(ready.wait, 60)
    bench.driver.add("other", make_prompt(2, 9), **REQUESTS[5])
    for _ in range(3):
        assert bench.driver.step({"slow": 0, "other": 0}).request_ids == ["other"]
    ready.set()
    bench.run(slow)
    assert until_end(slow) == alone(tokenizer_path, slow.prompt, **REQUESTS[0])


def test_a_step_that_gives_nobody_a_token_waits_for_a_mask_that_was_begun_before(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tokenizer_path)
    sequence = bench.driver.add("a", make_prompt(1, 6), **REQUESTS[0])
    while not sequence.output:
        bench.driver.step({"a": 0})
    guides, ready = bench.runner.batch._guides, threading.Event()
    next(iter(guides._entries.values())).is_slow = True
    guides._slow.submit(ready.wait, 5)
    monkeypatch.setattr("servd.worker.structured_output.PATIENCE_ALONE", 0)
    assert bench.driver.step({"a": 0}).request_ids == []
    monkeypatch.setattr("servd.worker.structured_output.PATIENCE_ALONE", 60)
    threading.Timer(0.05, ready.set).start()
    assert bench.driver.step({"a": 0}).request_ids == ["a"]


def test_plans_made_ahead_of_a_deferral_give_the_tokens_a_step_later(tokenizer_path: Path) -> None:
    bench = Bench(tokenizer_path)
    ready = threading.Event()
    bench.runner.batch._guides._building.submit(ready.wait, 60)
    sequence = bench.driver.add("a", make_prompt(1, 6), **REQUESTS[0])
    plans = [bench.driver.plan({"a": 0})]
    for i, position in enumerate((6, 7)):
        ahead = ScheduledRequests(["a"], [position], [1], [[]], [True])
        plans.append(SchedulerOutput(1 + i, [], ahead, [], [], []))
    assert bench.runner.execute(plans[0]).request_ids == []
    ready.set()
    bench.runner.batch._guides._building.submit(int).result()
    outputs: list[ModelRunnerOutput] = [bench.runner.execute(plan) for plan in plans[1:]]
    tokens = [token for output in outputs for token in output.sampled_token_ids]
    assert tokens == alone(tokenizer_path, sequence.prompt, **REQUESTS[0])[:2]


def test_what_is_sampled_behind_the_end_disturbs_nobody(tokenizer_path: Path) -> None:
    bench = Bench(tokenizer_path, knowing([], lambda _: 99))
    a = bench.driver.add("a", make_prompt(1, 6), guidance=regex("ab"))
    for _ in range(6):
        assert bench.driver.step({"a": 0}, num_drafts=2).failed == {}
    assert bench.text(a) == "ab" and set(a.output[2:]) <= {EOS}


@pytest.mark.parametrize(
    "guidance",
    [
        regex("("),
        "nonsense",
        json.dumps({"grammars": [{"lark_grammar": 'start: a\na: a a a a | b | c\nb: a b | "x"\nc: a c | "x" |'}]}),
    ],
)
def test_a_grammar_that_cannot_be_followed_fails_its_request_alone(tokenizer_path: Path, guidance: str) -> None:
    bench = Bench(tokenizer_path)
    bad = bench.driver.add("bad", make_prompt(1, 6), guidance=guidance, min_tokens=100, max_tokens=110)
    good = bench.driver.add("good", make_prompt(2, 6), **REQUESTS[0])
    failed: dict[str, str] = {}
    for _ in range(100):
        failed |= bench.driver.step({"bad": 0} if is_over(good) else {"bad": 0, "good": 0}).failed
        if failed and is_over(good):
            break
    assert list(failed) == ["bad"] and "grammar" in failed["bad"], bad
    assert until_end(good) == alone(tokenizer_path, good.prompt, **REQUESTS[0])


def test_constraints_that_leave_no_token_fail_the_request(tokenizer_path: Path) -> None:
    bench = Bench(tokenizer_path)
    bench.driver.add("a", make_prompt(1, 6), guidance=regex("[a-c]+"), allowed_token_ids=(7, 8))
    failed: dict[str, str] = {}
    for _ in range(50):
        failed |= bench.driver.step({"a": 0}).failed
        if failed:
            break
    assert "no token is left" in failed["a"]


def test_without_a_tokenizer_allowed_tokens_can_be_served_and_grammars_cannot() -> None:
    runner = make_runner(block_size=BLOCK)
    driver = Driver(runner.execute, BLOCK)
    a = driver.add("a", make_prompt(1, 6), allowed_token_ids=(5, 6))
    driver.add("b", make_prompt(1, 6), guidance=regex("a"))
    failed: dict[str, str] = {}
    for _ in range(20):
        failed |= driver.step({"a": 0, "b": 0}).failed
    assert set(a.output) <= {5, 6} and len(a.output) > 5
    assert "has no tokenizer" in failed["b"]


@pytest.mark.parametrize(
    ("pattern", "settings_", "length"),
    [
        ("[a-c]{2,9}", {"min_tokens": 9}, range(9, 10)),  # its end is held back while it can go on
        ("[ab]{2,9}", {"ignore_eos": True}, range(5, 10)),  # until nothing else is left
        ("z{3}", {"min_tokens": 30}, range(3, 4)),  # a complete grammar ends the answer
    ],
)
def test_the_end_is_held_back_only_while_the_grammar_leaves_a_choice(
    tokenizer_path: Path, pattern: str, settings_: dict[str, Any], length: range
) -> None:
    for seed in range(8):
        bench = Bench(tokenizer_path)
        a = bench.driver.add("a", make_prompt(seed, 6), seed=seed, guidance=regex(pattern), max_tokens=60, **settings_)
        bench.run(a)
        assert re.fullmatch(pattern, bench.text(a)) and len(bench.text(a)) in length


def test_a_request_that_meets_a_limit_spoils_nothing_for_those_with_the_same_grammar(tokenizer_path: Path) -> None:
    bomb = {"guidance": regex("((a{1,100}){1,100}){1,100}"), "min_tokens": 60, "max_tokens": 60}
    bench = Bench(tokenizer_path)
    lengths = []
    for name in "abc":
        sequence = bench.driver.add(name, make_prompt(1, 6), **bomb)
        failed: dict[str, str] = {}
        while not failed:
            failed = bench.driver.step({name: 0}).failed
        assert "too many expressions" in failed[name]
        lengths.append(len(sequence.output))
        bench.driver.finish(name)
    assert lengths[0] > 0 and len(set(lengths)) == 1
    bench.driver.add("d", make_prompt(1, 6))
    bench.driver.step({"d": 0})
    assert not bench.runner.batch._guides._entries  # nothing is kept of those that are gone


# -- forbidden texts ---------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.text("abcdxy12,", min_size=1, max_size=4), min_size=1, max_size=4),
    choices=st.lists(st.integers(0, 1000), max_size=30),
)
def test_exactly_the_tokens_that_complete_a_text_are_forbidden(
    tokenizer_path: Path, words: list[str], choices: list[int]
) -> None:
    tokens = TokenBytes(LLTokenizer(str(tokenizer_path), n_vocab=FakeModel.vocab_size, eos_token=[EOS]))
    forbidden = ForbiddenTexts(words, tokens)
    answer = b""
    for choice in choices:
        mask = np.full(tokens.num_words, -1, np.int32)
        forbidden.forbid(mask)
        allowed = [i for i in range(FakeModel.vocab_size) if mask[i // 32] >> (i % 32) & 1]
        whole = [answer + data for data in tokens.tokens]
        assert allowed == [i for i, text in enumerate(whole) if not any(word.encode() in text for word in words)]
        token_id = allowed[choice % len(allowed)]
        answer += tokens.tokens[token_id]
        forbidden.consume([token_id])
        assert not any(word.encode() in answer for word in words)


def test_masks_hold_the_bits_of_their_tokens() -> None:
    assert mask_of([0, 31, 32, 70], 2).tolist() == [1 - 2**31, 1]
