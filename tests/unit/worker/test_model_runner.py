"""The model runner with a model that hashes its past: any mistake in rows, slots or tables changes tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from servd.outputs import ScheduledRequests, SchedulerOutput
from servd.worker.model_runner import ModelRunner
from tests.unit.worker.driver import Driver
from tests.unit.worker.fake_model import NAN_TOKEN, FakeModel, make_runner

BLOCK = 4


def make_driver(**options: Any) -> tuple[Driver, ModelRunner, FakeModel]:
    runner = make_runner(block_size=BLOCK, **options)
    assert isinstance(runner.model, FakeModel)
    return Driver(runner.execute, BLOCK), runner, runner.model


def make_prompt(seed: int, length: int) -> list[int]:
    ids = [token for token in range(FakeModel.vocab_size) if token != NAN_TOKEN]
    return random.Random(seed).choices(ids, k=length)


def alone(prompt: list[int], num_tokens: int, **options: Any) -> list[int]:
    """What a request gives by itself, its prompt in one piece."""
    driver, _, _ = make_driver()
    sequence = driver.add("alone", prompt, **options)
    for _ in range(num_tokens):
        driver.step({"alone": 0})
    return sequence.output


def test_a_mixed_batch_of_chunks_and_decodes_gives_each_what_it_gives_alone() -> None:
    driver, _, model = make_driver()
    a = driver.add("a", make_prompt(1, 5), temperature=0.0)
    b = driver.add("b", make_prompt(2, 18), temperature=1.0, seed=7)
    c = driver.add("c", make_prompt(3, 1), temperature=0.8, top_p=0.9, seed=8)
    driver.step({"a": 0, "b": 3})
    driver.step({"a": 0, "b": 7, "c": 0})
    driver.step({"c": 0, "b": 1, "a": 0})
    for _ in range(6):
        driver.step({"b": 0, "a": 0, "c": 0})
    assert model.batch_sizes[:3] == [(8, 2), (9, 3), (3, 3)]  # packed: no padding
    assert model.logit_rows[:4] == [1, 2, 2, 3]  # a chunk that does not end the prompt gets no logits
    assert a.output == alone(a.prompt, 9, temperature=0.0)
    assert b.output == alone(b.prompt, 6, temperature=1.0, seed=7)
    assert c.output == alone(c.prompt, 8, temperature=0.8, top_p=0.9, seed=8)


def test_a_preempted_request_goes_on_as_if_nothing_had_happened() -> None:
    driver, _, _ = make_driver()
    a = driver.add("a", make_prompt(1, 6), seed=3)
    driver.add("b", make_prompt(2, 6), seed=4)
    for _ in range(3):
        driver.step({"a": 0, "b": 0})
    driver.preempt("a")
    driver.step({"b": 0})
    driver.step({"b": 0, "a": 5})
    for _ in range(4):
        driver.step({"b": 0, "a": 0})
    assert a.output == alone(a.prompt, 7, seed=3)


def test_a_drop_and_the_return_may_come_in_one_plan() -> None:
    driver, runner, _ = make_driver()
    a = driver.add("a", make_prompt(1, 6), seed=3)
    driver.step({"a": 0})
    driver.preempt("a")
    driver.step({"a": 0})
    assert a.output == alone(a.prompt, 2, seed=3)
    assert runner.batch.num_requests == 1


def test_plans_made_before_the_token_is_known_read_it_from_the_workers_table() -> None:
    driver, runner, _ = make_driver()
    a = driver.add("a", make_prompt(1, 6), seed=3)
    first = driver.plan({"a": 0})
    second = SchedulerOutput(1, [], ScheduledRequests(["a"], [6], [1], [[]], [True]), [], [], [])
    third = SchedulerOutput(2, [], ScheduledRequests(["a"], [7], [1], [[]], [True]), [], [], [])
    tokens = [runner.execute(plan).sampled_token_ids[0] for plan in (first, second, third)]
    assert tokens == alone(a.prompt, 3, seed=3)
    assert runner.batch.token_ids("a") == a.prompt + tokens


def test_a_forked_block_is_copied_before_it_is_written() -> None:
    driver, _, _ = make_driver()
    prompt = make_prompt(5, 6)  # a block and a half
    a, b = driver.add("a", prompt, seed=1), driver.add("b", prompt, seed=2)
    driver.step({"a": 0})
    full, half = a.blocks
    own = driver.new_block()
    b.blocks, b.num_computed = [full, half], 5  # shares both; its last token is computed again for the logits
    b_copy = {"block_copies": [(half, own)], "replaced_blocks": [("b", 1, own)]}
    driver.step({"a": 0, "b": 0}, **b_copy)
    for _ in range(5):
        driver.step({"a": 0, "b": 0})
    assert a.output == alone(prompt, 7, seed=1)
    assert b.output == alone(prompt, 6, seed=2)
    assert a.output[:6] != b.output


def test_a_nan_row_fails_alone_and_stays_out_until_dropped() -> None:
    driver, runner, model = make_driver()
    a = driver.add("a", make_prompt(1, 5), temperature=0.0)
    driver.add("bad", [1, NAN_TOKEN, 2], temperature=0.0)
    output = driver.step({"bad": 0, "a": 0})
    assert output.request_ids == ["a"] and len(output.sampled_token_ids) == 1
    assert list(output.failed) == ["bad"] and "NaN" in output.failed["bad"]
    ahead = driver.plan({"a": 0})
    ahead.scheduled = ScheduledRequests(["bad", "a"], [3, 5], [1, 1], [[], []], [True, True])
    output = runner.execute(ahead)  # planned before the failure was known
    assert list(output.failed) == ["bad"] and output.request_ids == ["a"]
    assert model.batch_sizes[-1] == (1, 1)
    a.output.append(output.sampled_token_ids[0])
    driver.finish("bad")
    driver.step({"a": 0})
    assert a.output == alone(a.prompt, 3, temperature=0.0)
    assert runner.batch.failed == {} and runner.batch.num_requests == 1


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([1, 101], "out of the model's vocabulary; allowed: 0 to 100"),
        ([-1], "out of the model's vocabulary"),
        ([2**40], "out of the model's vocabulary"),
        ([], "it has 0 tokens; allowed: 1 to 64"),
        ([1] * 65, "it has 65 tokens; allowed: 1 to 64"),
    ],
)
def test_a_request_that_is_wrong_in_itself_fails_alone(prompt: list[int], reason: str) -> None:
    driver, _, _ = make_driver()
    a = driver.add("a", make_prompt(1, 5), temperature=0.0)
    driver.add("bad", prompt)
    output = driver.step({"bad": 0, "a": 0})
    assert reason in output.failed["bad"]
    assert a.output == alone(a.prompt, 1, temperature=0.0)


def test_more_requests_than_rows_fail_alone() -> None:
    driver, _, _ = make_driver(max_num_seqs=2)
    for name in "abc":
        driver.add(name, [1, 2])
    output = driver.step({"a": 0, "b": 0, "c": 0})
    assert output.request_ids == ["a", "b"]
    assert "max_num_seqs" in output.failed["c"]


@pytest.mark.parametrize(
    ("scheduled", "reason"),
    [
        (ScheduledRequests(["ghost", "a"], [0, 5], [1, 1], [[], []], [True, True]), "does not know it"),
        (ScheduledRequests(["b", "a"], [5, 5], [2, 1], [[9], []], [True, True]), "planned, 6 are known"),
        (ScheduledRequests(["c", "a"], [4, 5], [1, 1], [[], []], [True, True]), "1 KV blocks do not hold 5 tokens"),
    ],
)
def test_a_plan_that_is_wrong_for_one_request_fails_that_one(scheduled: ScheduledRequests, reason: str) -> None:
    driver, runner, _ = make_driver()
    a = driver.add("a", make_prompt(1, 5), temperature=0.0)
    driver.add("b", make_prompt(2, 5))
    driver.add("c", make_prompt(3, 4))
    driver.step({"a": 0, "b": 0, "c": 0})
    output = runner.execute(SchedulerOutput(1, [], scheduled, [], [], []))
    assert reason in output.failed[scheduled.request_ids[0]]
    assert output.sampled_token_ids == alone(a.prompt, 2, temperature=0.0)[1:]


def test_after_a_step_that_raised_requests_can_be_replayed() -> None:
    driver, runner, model = make_driver()
    a, b = driver.add("a", make_prompt(1, 5), seed=1), driver.add("b", make_prompt(2, 9), seed=2)
    driver.step({"a": 0, "b": 4})
    model.fail_next = True
    with pytest.raises(RuntimeError, match="out of memory"):
        driver.step({"a": 0, "b": 0})
    for name in "ab":
        driver.preempt(name)
    for _ in range(3):
        driver.step({"a": 0, "b": 0})
    assert a.output == alone(a.prompt, 4, seed=1)
    assert b.output == alone(b.prompt, 3, seed=2)
    assert runner.batch.num_requests == 2


def test_a_request_may_fill_the_context_to_its_last_token() -> None:
    driver, _, _ = make_driver(max_model_len=16)
    a = driver.add("a", make_prompt(1, 14), temperature=0.0)
    for _ in range(3):
        driver.step({"a": 0})
    assert a.output == alone(a.prompt, 3, temperature=0.0)


def test_prompt_logprobs_come_for_every_prompt_token_but_the_first_in_any_chunking() -> None:
    prompt = make_prompt(6, 11)
    whole_driver, _, _ = make_driver()
    whole_driver.add("a", prompt, prompt_logprobs=2, temperature=0.0)
    (whole,) = whole_driver.step({"a": 0}).prompt_logprobs.values()
    assert [entry.token_id for entry in whole] == prompt[1:]
    assert all(len(entry.top_token_ids) == 2 for entry in whole)
    driver, _, _ = make_driver()
    driver.add("a", prompt, prompt_logprobs=2, temperature=0.0)
    driver.add("b", make_prompt(7, 4), temperature=0.0)
    pieces = [driver.step({"b": 0, "a": share}).prompt_logprobs for share in (4, 1, 5, 1, 1)]
    assert [len(piece.get("a", [])) for piece in pieces] == [4, 1, 5, 0, 0]
    assert [entry for piece in pieces for entry in piece.get("a", [])] == whole


def test_prompt_logprobs_are_log_softmax_of_the_position_before() -> None:
    driver, _, model = make_driver()
    prompt = make_prompt(6, 7)
    driver.add("a", prompt, prompt_logprobs=0, temperature=0.0)
    (found,) = driver.step({"a": 0}).prompt_logprobs.values()
    for length in range(1, 7):
        probe_driver, runner, model = make_driver()
        probe = probe_driver.add("p", prompt[:length], temperature=0.0, logprobs=20)
        probe_driver.step({"p": 0})
        value = 0
        for position, token in enumerate(prompt[:length]):
            value = (value * 31 + token * 7 + position + 1) % 65_521
        expected = torch.log_softmax(model.compute_logits(torch.tensor([[value, 0.0]], dtype=torch.float64)), -1)
        assert found[length - 1].logprob == pytest.approx(float(expected[0, prompt[length]]), rel=1e-6)
        assert probe.output == [int(expected.argmax())]
        assert runner.batch.num_requests == 1


def test_many_prompt_logprobs_are_computed_in_slices() -> None:
    driver, _, model = make_driver(max_model_len=256, num_blocks=80)
    prompt = make_prompt(6, 200)
    driver.add("a", prompt, prompt_logprobs=1)
    (found,) = driver.step({"a": 0}).prompt_logprobs.values()
    assert [entry.token_id for entry in found] == prompt[1:]
    assert model.logit_rows == [64, 64, 64, 7, 1]


def test_nan_in_a_prompt_position_fails_that_request() -> None:
    driver, _, _ = make_driver()
    driver.add("a", [5, NAN_TOKEN, 6], prompt_logprobs=1)
    output = driver.step({"a": 2})
    assert "NaN" in output.failed["a"] and output.prompt_logprobs == {}


def test_logprobs_are_reported_for_those_who_asked() -> None:
    driver, _, _ = make_driver()
    driver.add("a", make_prompt(1, 5), logprobs=3)
    driver.add("b", make_prompt(2, 5))
    output = driver.step({"b": 0, "a": 0})
    assert list(output.logprobs) == ["a"]
    assert output.logprobs["a"][0].token_id == output.sampled_token_ids[1]
    assert len(output.logprobs["a"][0].top_token_ids) == 3


def test_a_plan_without_live_requests_gives_an_empty_result() -> None:
    driver, _, model = make_driver()
    driver.add("bad", [])
    output = driver.step({"bad": 0})
    assert output.request_ids == [] and list(output.failed) == ["bad"]
    assert model.batch_sizes == []


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_each_request_what_it_gives_alone(data: st.DataObject) -> None:
    driver, runner, _ = make_driver(num_blocks=3000, max_num_seqs=5)
    count = data.draw(st.integers(1, 5))
    options: list[dict[str, Any]] = [
        {"seed": i, "temperature": data.draw(st.sampled_from([0.0, 1.0])), "frequency_penalty": 0.5 * (i % 2)}
        for i in range(count)
    ]
    for i in range(count):
        driver.add(str(i), make_prompt(i, data.draw(st.integers(1, 15))), **options[i])
    for _ in range(data.draw(st.integers(1, 15))):
        names = data.draw(st.lists(st.sampled_from(sorted(driver.sequences)), unique=True, min_size=1))
        for name in names:
            if driver.sequences[name].is_known and data.draw(st.integers(0, 5)) == 0:
                driver.preempt(name)
        driver.step({name: data.draw(st.integers(0, 6)) for name in names})
    for i in range(count):
        sequence = driver.sequences[str(i)]
        assert sequence.output == alone(sequence.prompt, len(sequence.output), **options[i])
        if sequence.is_known:
            assert runner.batch.token_ids(str(i)) == sequence.tokens
