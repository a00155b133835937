"""Room for guesses: what a plan grants, and what becomes of the tokens that they bring."""

import pytest

from servd.outputs import ModelRunnerOutput, TokenLogprobs
from servd.request import FinishReason
from tests.unit.scheduler.conftest import WorkerModel, expected_tokens, shares


def granted(plan) -> dict[str, int]:
    return dict(zip(plan.scheduled.request_ids, plan.scheduled.num_draft_tokens, strict=True))


def test_drafts_get_what_is_left_beside_no_prompt_and_never_go_beyond_the_last_token(make_scheduler, make_request):
    scheduler, worker = make_scheduler(max_num_batched_tokens=10, num_speculative_tokens=6), WorkerModel(4)
    scheduler.add(make_request("a", 4, max_tokens=30))
    scheduler.add(make_request("b", 4, max_tokens=30))
    plan = scheduler.schedule()
    assert plan.scheduled.num_draft_tokens == []  # the end of a prompt does not wait for guesses
    scheduler.update_from_output(worker.execute(plan))
    plan = scheduler.schedule()
    assert (shares(plan), granted(plan)) == ({"a": 1, "b": 1}, {"a": 6, "b": 2})
    scheduler.update_from_output(worker.execute(plan))
    scheduler.finish("b", FinishReason.ABORT)
    scheduler.add(make_request("c", 3, max_tokens=3))
    plan = scheduler.schedule()
    assert (shares(plan), plan.scheduled.num_draft_tokens) == ({"a": 1, "c": 3}, [])
    scheduler.update_from_output(worker.execute(plan))
    assert granted(scheduler.schedule()) == {"a": 6, "c": 1}  # of its three tokens one is there, one is sampled


@pytest.mark.parametrize(
    ("num_blocks", "drafts", "grant"), [(7, 3, [3, 3]), (8, 4, [4, 0]), (8, 8, []), (10, 8, [8, 0])]
)
def test_drafts_take_no_block_that_running_requests_will_need(make_scheduler, make_request, num_blocks, drafts, grant):
    scheduler, worker = make_scheduler(num_blocks=num_blocks, num_speculative_tokens=drafts), WorkerModel(4)
    for name in "ab":
        scheduler.add(make_request(name, 4, max_tokens=20))
    scheduler.update_from_output(worker.execute(scheduler.schedule()))
    # 2 blocks hold the prompts, 2 what is computed now, and one is kept for each: guesses get what is left of
    # `num_blocks`, of which one is the null block. Each takes its first 3 slots from the block it has.
    assert scheduler.schedule().scheduled.num_draft_tokens == grant


def test_a_plan_made_ahead_has_room_for_whatever_the_drafts_before_it_brought(make_scheduler, make_request):
    scheduler, worker = make_scheduler(num_speculative_tokens=7), WorkerModel(4)
    request = make_request("a", 5, max_tokens=40)
    scheduler.add(request)
    plans = [scheduler.schedule() for _ in range(4)]
    # As if all guesses were wrong.
    assert [plan.scheduled.num_computed_tokens for plan in plans] == [[0], [5], [6], [7]]
    assert len(scheduler.cache.block_ids(request)) == 8  # 5 of the prompt, 3 * 7 guesses, 3 sampled: 29 tokens
    for plan in plans:
        scheduler.update_from_output(worker.execute(plan))
        assert request.num_computed_tokens == request.num_tokens - 1 + request.num_inflight_tokens
    assert request.output_token_ids == expected_tokens(request.prompt_token_ids, len(request.output_token_ids))
    assert worker.num_accepted > 0 and request.num_inflight_drafts == 0


def test_room_for_drafts_ends_where_the_last_token_is_sampled(make_scheduler, make_request):
    scheduler = make_scheduler(num_speculative_tokens=7)
    request = make_request("a", 4, max_tokens=9)  # the thirteenth token needs no slot
    scheduler.add(request)
    for _ in range(4):
        scheduler.schedule()
    assert len(scheduler.cache.block_ids(request)) == 3


def test_a_plan_behind_the_last_token_of_a_request_gives_it_none(make_scheduler, make_request):
    scheduler, worker = make_scheduler(num_speculative_tokens=3), WorkerModel(4)
    request = make_request("a", 5, max_tokens=5)
    scheduler.add(request)
    scheduler.update_from_output(worker.execute(scheduler.schedule()))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert shares(second) == {"a": 1}  # it cannot be known yet that the guesses of the first are all right
    tokens = expected_tokens(request.prompt_token_ids, 5)[1:]
    (update,) = scheduler.update_from_output(
        ModelRunnerOutput(first.step_id, ["a"], tokens, {}, {}, {}, 0.001, num_accepted_tokens=[3])
    )
    assert (update.new_token_ids, update.finish_reason) == (tokens, FinishReason.LENGTH)
    assert scheduler.update_from_output(ModelRunnerOutput(second.step_id, [], [], {}, {}, {}, 0.001)) == []
    assert not scheduler.has_work()


def test_tokens_behind_the_one_that_ends_a_request_are_dropped_with_their_logprobs(make_scheduler, make_request):
    scheduler, worker = make_scheduler(num_speculative_tokens=3), WorkerModel(4)
    request = make_request("a", 5, max_tokens=20, eos_token_ids=frozenset({60}))
    scheduler.add(request)
    scheduler.update_from_output(worker.execute(scheduler.schedule()))
    plan = scheduler.schedule()
    logprobs = [TokenLogprobs(token, -1.0, 1, [], []) for token in (50, 60, 70)]
    (update,) = scheduler.update_from_output(
        ModelRunnerOutput(plan.step_id, ["a"], [50, 60, 70], {"a": logprobs}, {}, {}, 0.001, num_accepted_tokens=[2])
    )
    assert (update.new_token_ids, update.stop_token_id, update.logprobs) == ([50, 60], 60, logprobs[:2])
    assert update.finish_reason is FinishReason.STOP


def test_only_accepted_tokens_are_findable_in_the_prefix_cache(make_scheduler, make_request):
    scheduler = make_scheduler(num_speculative_tokens=7)
    first = make_request("a", 6, max_tokens=30)
    scheduler.add(first)
    worker = WorkerModel(4)
    for _ in range(5):
        scheduler.update_from_output(worker.execute(scheduler.schedule()))
    assert worker.num_accepted > 0
    again = make_request("b", first.all_token_ids(), max_tokens=30)
    scheduler.add(again)
    plan = scheduler.schedule()
    assert again.num_cached_tokens == (first.num_tokens - 1) // 4 * 4
    scheduler.update_from_output(worker.execute(plan))  # reads every slot of the shared blocks
    assert again.output_token_ids == expected_tokens(again.prompt_token_ids, len(again.output_token_ids))
