"""Steps with guesses, right and wrong, give each request the tokens it gives alone without any."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from servd.outputs import ScheduledRequests, SchedulerOutput
from servd.worker.draft_budget import StepCost
from servd.worker.drafter import Drafter, Int32s, Int64s
from servd.worker.model_runner import ModelRunner
from tests.unit.worker.driver import Driver, Sequence
from tests.unit.worker.fake_model import NAN_TOKEN, FakeModel, make_runner

BLOCK = 4
Guess = Callable[[list[int], int], list[int]]


class GivenDrafter(Drafter):
    """Guesses what it is told: a function of a request's tokens and of how many guesses are allowed."""

    def __init__(self, guess: Guess) -> None:
        super().__init__()
        self.guess = guess

    def draft(self, rows: Int64s, most: Int64s, tokens: Int32s, num_tokens: Int64s) -> Int64s:
        counts = np.zeros(len(rows), np.int64)
        for i, (row, end) in enumerate(zip(rows.tolist(), num_tokens.tolist(), strict=True)):
            guessed = self.guess(tokens[row, :end].tolist(), int(most[i]))[: most[i]]
            tokens[row, end : end + len(guessed)] = guessed
            counts[i] = len(guessed)
        return counts


def make_driver(guess: Guess | None = None, **options: Any) -> tuple[Driver, ModelRunner, FakeModel]:
    runner = make_runner(block_size=BLOCK, drafter=None if guess is None else GivenDrafter(guess), **options)
    assert isinstance(runner.model, FakeModel)
    return Driver(runner.execute, BLOCK), runner, runner.model


def make_prompt(seed: int, length: int) -> list[int]:
    ids = [token for token in range(FakeModel.vocab_size) if token != NAN_TOKEN]
    return random.Random(seed).choices(ids, k=length)


def alone(prompt: list[int], num_tokens: int, **options: Any) -> tuple[list[int], list[Any]]:
    """Tokens and log-probabilities of a request by itself, one token a step."""
    driver, _, _ = make_driver(num_blocks=200)
    sequence = driver.add("alone", prompt, **options)
    for _ in range(num_tokens):
        driver.step({"alone": 0})
    return sequence.output, [entry for output in sequence.outputs for entry in output.logprobs.get("alone", [])]


def knowing(answers: list[list[int]], wrong_at: Callable[[int], int]) -> Guess:
    """Guesses the rest of the whole sequence in `answers` that begins so, with an error at `wrong_at(length)`."""

    def guess(tokens: list[int], count: int) -> list[int]:
        for answer in answers:
            if answer[: len(tokens)] == tokens:
                right = answer[len(tokens) : len(tokens) + count]
                at = wrong_at(len(tokens))
                return [(token + (i == at)) % FakeModel.vocab_size for i, token in enumerate(right)]
        return []

    return guess


def begun(
    seed: int, num_tokens: int, wrong_at: Callable[[int], int] = lambda _: 99
) -> tuple[Driver, Sequence, FakeModel, list[int]]:
    """A greedy request "a" with its first token, whose answer is guessed with errors at `wrong_at`; and that answer."""
    prompt = make_prompt(seed, 6)
    expected, _ = alone(prompt, num_tokens, temperature=0.0)
    driver, _, model = make_driver(knowing([prompt + expected], wrong_at))
    sequence = driver.add("a", prompt, temperature=0.0, max_tokens=num_tokens)
    driver.step({"a": 0})
    return driver, sequence, model, expected


def test_right_guesses_bring_several_tokens_in_one_step() -> None:
    driver, a, model, expected = begun(seed=1, num_tokens=12)
    output = driver.step({"a": 0}, num_drafts=5)
    assert output.num_accepted_tokens == [5] and output.num_draft_tokens == 5
    assert model.batch_sizes[-1] == (6, 1) and model.logit_rows[-1] == 6
    driver.step({"a": 0}, num_drafts=5)  # of which there is room for 4: the twelfth token is the last
    assert a.output == expected


def test_what_follows_a_wrong_guess_is_computed_again() -> None:
    driver, a, _, expected = begun(seed=2, num_tokens=9, wrong_at=lambda _: 2)
    while len(a.output) < 7:
        assert driver.step({"a": 0}, num_drafts=6).num_accepted_tokens == [2]
    driver.step({"a": 0})
    driver.step({"a": 0})
    assert a.output == expected


def test_a_plan_that_knows_too_little_goes_on_from_what_the_worker_has() -> None:
    driver, a, _, expected = begun(seed=3, num_tokens=9)
    blocks = [[driver.new_block() for _ in range(2)], []]
    tokens = []
    for i in range(2):  # both planned when one token was known
        scheduled = ScheduledRequests(["a"], [6 + i], [1], [blocks[i]], [True], [3])
        tokens.append(driver.execute(SchedulerOutput(1 + i, [], scheduled, [], [], [])).sampled_token_ids)
    assert [*a.output, *tokens[0], *tokens[1]] == expected
    scheduled = ScheduledRequests(["a"], [8], [1], [[]], [True], [3])
    output = driver.execute(SchedulerOutput(3, [], scheduled, [], [], []))
    assert (output.request_ids, output.failed) == ([], {})  # it has all its tokens: nothing is left to compute


def test_a_plan_that_grants_more_than_its_blocks_hold_fails_that_request() -> None:
    driver, _, _, _ = begun(seed=3, num_tokens=20)
    scheduled = ScheduledRequests(["a"], [6], [1], [[]], [True], [3])  # two blocks of 4, of which 7 slots are taken
    output = driver.execute(SchedulerOutput(1, [], scheduled, [], [], []))
    assert output.failed == {"a": "2 KV blocks do not hold 10 tokens"} and output.request_ids == []


def test_log_probabilities_come_with_every_token_and_are_those_of_single_steps() -> None:
    prompt, options = make_prompt(4, 6), {"temperature": 0.9, "seed": 3, "logprobs": 2}
    expected, logprobs = alone(prompt, 10, **options)
    driver, _, _ = make_driver(knowing([prompt + expected], lambda length: length % 3))
    a = driver.add("a", prompt, **options)
    while len(a.output) < 8:
        driver.step({"a": 0}, num_drafts=4)
    found = [entry for output in a.outputs for entry in output.logprobs["a"]]
    assert found == logprobs[: len(a.output)] and a.output == expected[: len(a.output)]


def test_a_wrong_guess_with_nan_logits_fails_nobody() -> None:
    prompt = make_prompt(5, 6)
    expected, _ = alone(prompt, 4, temperature=0.0)
    driver, _, _ = make_driver(lambda tokens, count: [NAN_TOKEN] * count)
    a = driver.add("a", prompt, temperature=0.0)
    for _ in range(4):
        assert driver.step({"a": 0}, num_drafts=3).failed == {}
    assert a.output == expected


def test_a_token_that_kills_its_successors_is_given_before_the_failure() -> None:
    prompt = make_prompt(6, 6)
    bias = {NAN_TOKEN: 100.0}
    driver, _, _ = make_driver(lambda tokens, count: [NAN_TOKEN] * count)
    a = driver.add("a", prompt, temperature=0.0, logit_bias=bias)
    b = driver.add("b", make_prompt(7, 5), temperature=0.0)
    output = driver.step({"a": 0, "b": 0}, num_drafts=3)
    assert a.output == [NAN_TOKEN] and output.failed == {}
    output = driver.step({"a": 0, "b": 0}, num_drafts=3)
    assert list(output.failed) == ["a"] and len(b.output) == 2


def test_what_a_row_costs_is_learned_from_steps_whose_rows_all_sample() -> None:
    class SeenCost(StepCost):
        def observe(self, num_rows: int, seconds: float) -> None:
            seen.append(num_rows)

    seen: list[int] = []
    drafter = GivenDrafter(lambda tokens, count: [1] * count)
    drafter.cost = SeenCost()
    driver = Driver(make_runner(block_size=BLOCK, drafter=drafter).execute, BLOCK)
    driver.add("a", make_prompt(8, 5), temperature=0.0)
    driver.add("b", make_prompt(9, 5), temperature=0.0)
    driver.step({"a": 0})
    driver.step({"a": 0}, num_drafts=3)
    driver.step({"a": 0, "b": 2})
    driver.step({"a": 0, "b": 2})
    driver.step({"a": 0, "b": 1})
    assert seen == [4, 2]  # rows of prompts are cheaper, and come in other numbers


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_schedule_with_any_guesses_gives_each_request_what_it_gives_alone(data: st.DataObject) -> None:
    count, length = data.draw(st.integers(1, 4)), 24
    options: list[dict[str, Any]] = [
        {
            "seed": i,
            "temperature": data.draw(st.sampled_from([0.0, 1.0])),
            "top_k": data.draw(st.sampled_from([0, 5])),
            "top_p": data.draw(st.sampled_from([1.0, 0.8])),
            "frequency_penalty": 0.5 * (i % 2),
            "min_tokens": 6 * (i % 3),
        }
        for i in range(count)
    ]
    prompts = [make_prompt(i, data.draw(st.integers(1, 15))) for i in range(count)]
    expected = [alone(prompt, length, **chosen)[0] for prompt, chosen in zip(prompts, options, strict=True)]
    mistakes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    guess = knowing(
        [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)],
        lambda tokens: mistakes[tokens % len(mistakes)],
    )
    driver, runner, _ = make_driver(guess, num_blocks=3000, max_num_seqs=5)
    for i in range(count):
        driver.add(str(i), prompts[i], max_tokens=length, **options[i])
    for _ in range(data.draw(st.integers(1, 15))):
        unfinished = [name for name, sequence in driver.sequences.items() if len(sequence.output) < length]
        if not unfinished:
            break
        names = data.draw(st.lists(st.sampled_from(unfinished), unique=True, min_size=1))
        for name in names:
            if driver.sequences[name].is_known and data.draw(st.integers(0, 5)) == 0:
                driver.preempt(name)
        shares = {name: data.draw(st.integers(0, 6)) for name in names}
        driver.step(shares, num_drafts=data.draw(st.integers(0, 6)))
    for i in range(count):
        sequence = driver.sequences[str(i)]
        assert sequence.output == expected[i][: len(sequence.output)]
        if sequence.is_known:
            assert runner.batch.token_ids(str(i)) == sequence.tokens
