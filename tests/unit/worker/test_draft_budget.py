"""When a guess pays: from steps of known cost to the probability at which one more row breaks even."""

from __future__ import annotations

import random

import numpy as np
import pytest

from servd.worker.draft_budget import StepCost
from servd.worker.drafter import Drafter


def measured(fixed: float, slope: float, rows: list[int], count: int = 200) -> StepCost:
    cost, rng = StepCost(), random.Random(0)
    for _ in range(count):
        num_rows = rng.choice(rows)
        cost.observe(num_rows, (fixed + slope * num_rows) * rng.uniform(0.97, 1.03))
    return cost


@pytest.mark.parametrize(("fixed", "slope"), [(8e-3, 0.2e-3), (2e-3, 0.5e-3), (5e-3, 0.02e-3)])
@pytest.mark.parametrize("num_reqs", [1, 8, 32])
def test_a_guess_breaks_even_where_its_row_costs_what_a_token_does(fixed: float, slope: float, num_reqs: int) -> None:
    cost = measured(fixed, slope, list(range(1, 33)))
    assert cost.break_even(num_reqs) == pytest.approx(slope * num_reqs / (fixed + slope * num_reqs), abs=0.06)


def test_the_larger_the_batch_the_surer_a_guess_must_be() -> None:
    for cost in (StepCost(), measured(8e-3, 0.3e-3, [1, 4, 8]), measured(8e-3, 0.3e-3, [32])):
        levels = [cost.break_even(n) for n in (1, 2, 8, 32, 256)]
        assert levels == sorted(levels) and 0 < levels[0] < 0.2 and 0.7 < levels[-1] < 1


def test_one_step_that_was_held_up_changes_little_and_is_soon_forgotten() -> None:
    cost = measured(8e-3, 0.2e-3, [1, 2, 4, 8])
    before = cost.break_even(4)
    cost.observe(8, 3.0)
    assert cost.break_even(4) < 3 * before
    for i in range(200):
        cost.observe(1 + i % 8, 8e-3 + 0.2e-3 * (1 + i % 8))
    assert cost.break_even(4) == pytest.approx(before, abs=0.03)


def test_a_change_of_the_machine_is_learned() -> None:
    cost = measured(8e-3, 0.1e-3, [1, 2, 4, 8])
    for i in range(300):
        num_rows = 1 + i % 8
        cost.observe(num_rows, 2e-3 + 2e-3 * num_rows)
    assert cost.break_even(1) == pytest.approx(0.5, abs=0.1)


def test_in_a_large_batch_only_sure_guesses_are_made() -> None:
    def drafts(num_reqs: int) -> tuple[int, int]:
        """Guesses for a request that repeats itself and for one that hardly does, among so many."""
        drafter = Drafter()
        drafter.cost = measured(8e-3, 0.4e-3, [1, 8, 32])
        tokens = np.zeros((num_reqs, 200), np.int32)
        tokens[0, :120] = np.tile(np.arange(10, 30), 6)
        tokens[1:, :120] = np.arange(1000, 1120)
        tokens[1, 118:120] = tokens[1, 40:42]
        rows, most = np.arange(num_reqs), np.full(num_reqs, 7)
        counts = np.zeros(num_reqs, np.int64)
        for end in range(60, 121):
            counts = drafter.draft(rows, most, tokens, np.full(num_reqs, end))
        return int(counts[0]), int(counts[1])

    sure_alone, unsure_alone = drafts(2)
    sure, unsure = drafts(64)
    assert sure_alone == sure == 7
    assert unsure_alone > unsure == 0


def test_a_new_request_begins_with_what_those_before_it_taught() -> None:
    drafter, tokens = Drafter(), np.zeros((1, 200), np.int32)

    def num_guessed(text: list[int], prompt: int) -> int:
        """At the end of a request in the one row, whose tokens after the prompt come one by one."""
        tokens[0, : len(text)] = text
        for end in range(prompt, len(text) + 1):
            (count,) = drafter.draft(np.array([0]), np.array([7]), tokens.copy(), np.array([end]))
        drafter.forget(0)
        return int(count)

    pair_comes_again = [1, 2, 3, 4, 5, 1, 2]
    assert num_guessed(pair_comes_again, 7) > 0
    for _ in range(30):
        num_guessed([token for i in range(40) for token in (1, 2, 100 + i)], 9)  # followed by something else each time
    assert num_guessed(pair_comes_again, 7) == 0
