"""What the scheduler plans, step by step, and what requests get in the end."""

import pytest

from servd.request import FinishReason, RequestStatus
from servd.sampling_params import SamplingParams
from servd.scheduler.policies import POLICIES
from tests.unit.scheduler.conftest import WorkerModel, expected_tokens, shares


def run_to_end(scheduler, steps_in_flight: int = 1, limit: int = 2000) -> dict[str, FinishReason]:
    """Run until nothing is left, with plans made ahead of results; returns how each request ended."""
    worker, results, ended = WorkerModel(scheduler.cache.block_size), [], {}
    for _ in range(limit):
        while len(results) < steps_in_flight and (plan := scheduler.schedule()) is not None:
            results.append(worker.execute(plan))
        if not results:
            assert not scheduler.has_work(), f"stuck with {list(scheduler.requests.values())}"
            break
        for update in scheduler.update_from_output(results.pop(0)):
            if update.finish_reason is not None:
                ended[update.request.request_id] = update.finish_reason
        scheduler.cache.check_integrity()
    assert scheduler.cache.pool.num_free == scheduler.cache.pool.num_usable
    return ended


def test_a_prompt_is_computed_in_chunks_and_samples_only_at_its_end(make_scheduler, make_request):
    scheduler, worker = make_scheduler(max_num_batched_tokens=10), WorkerModel(4)
    scheduler.add(make_request("a", 25))
    seen = []
    for _ in range(4):
        plan = scheduler.schedule()
        seen.append((plan.scheduled.num_computed_tokens[0], plan.scheduled.num_scheduled_tokens[0],
                     plan.scheduled.samples[0]))  # fmt: skip
        scheduler.update_from_output(worker.execute(plan))
    assert seen == [(0, 10, False), (10, 10, False), (20, 5, True), (25, 1, True)]


def test_prompt_chunks_and_running_answers_share_a_step(make_scheduler, make_request):
    scheduler, worker = make_scheduler(max_num_batched_tokens=16), WorkerModel(4)
    scheduler.add(make_request("a", 4, max_tokens=20))
    scheduler.update_from_output(worker.execute(scheduler.schedule()))
    scheduler.add(make_request("b", 40))
    assert shares(scheduler.schedule()) == {"a": 1, "b": 15}


def test_a_long_prompt_leaves_a_token_for_each_request_behind_it(make_scheduler, make_request):
    scheduler, worker = make_scheduler(scheduling_policy="priority", max_num_batched_tokens=16), WorkerModel(4)
    scheduler.add(make_request("b", 4, max_tokens=50, priority=5))
    scheduler.update_from_output(worker.execute(scheduler.schedule()))
    scheduler.add(make_request("long", 100, priority=1))
    scheduler.update_from_output(worker.execute(scheduler.schedule()))
    assert shares(scheduler.schedule()) == {"long": 15, "b": 1}


def test_a_plan_is_made_before_the_tokens_of_the_last_one_are_known(make_scheduler, make_request):
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5, max_tokens=3))
    first, second, third = scheduler.schedule(), scheduler.schedule(), scheduler.schedule()
    assert [p.scheduled.num_computed_tokens for p in (first, second, third)] == [[0], [5], [6]]
    assert scheduler.schedule() is None  # the third token is the last: its KV is never needed


@pytest.mark.parametrize("drafts", [0, 3, 8])
@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_tokens_depend_neither_on_planning_ahead_nor_on_drafts(make_scheduler, make_request, steps_in_flight, drafts):
    scheduler = make_scheduler(max_num_batched_tokens=16, num_speculative_tokens=drafts)
    requests = [make_request(name, 3 + 7 * i, max_tokens=5 + i) for i, name in enumerate("abcdef")]
    for request in requests:
        scheduler.add(request)
    ended = run_to_end(scheduler, steps_in_flight)
    assert set(ended.values()) == {FinishReason.LENGTH}
    for request in requests:
        count = request.sampling_params.max_tokens
        assert request.output_token_ids == expected_tokens(request.prompt_token_ids, count)


@pytest.mark.parametrize("drafts", [0, 5])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_preempted_requests_get_the_same_tokens(make_scheduler, make_request, steps_in_flight, drafts):
    scheduler = make_scheduler(num_blocks=16, num_speculative_tokens=drafts)
    requests = [make_request(name, 9 + i, max_tokens=20) for i, name in enumerate("abcde")]
    for request in requests:
        scheduler.add(request)
    run_to_end(scheduler, steps_in_flight)
    assert scheduler.num_preemptions > 0
    for request in requests:
        assert request.output_token_ids == expected_tokens(request.prompt_token_ids, 20)


def test_the_last_to_arrive_is_preempted(make_scheduler, make_request):
    scheduler, worker = make_scheduler(num_blocks=9), WorkerModel(4)
    first, second = make_request("a", 12, max_tokens=30), make_request("b", 12, max_tokens=30)
    scheduler.add(first)
    scheduler.add(second)
    while second.num_preemptions == 0:
        scheduler.update_from_output(worker.execute(scheduler.schedule()))
    assert first.status is RequestStatus.RUNNING and first.num_preemptions == 0
    assert second.status is RequestStatus.WAITING


def test_two_requests_that_do_not_fit_together_both_finish_with_few_preemptions(make_scheduler, make_request):
    scheduler = make_scheduler(num_blocks=41, max_num_batched_tokens=16)
    giants = [make_request(name, 70, max_tokens=60) for name in "ab"]
    for giant in giants:
        scheduler.add(giant)
    assert set(run_to_end(scheduler, 2)) == {"a", "b"}
    assert scheduler.num_preemptions <= 2
    for giant in giants:
        assert giant.output_token_ids == expected_tokens(giant.prompt_token_ids, 60)


def test_a_request_is_admitted_only_if_its_whole_prompt_fits(make_scheduler, make_request):
    scheduler, worker = make_scheduler(num_blocks=11, max_num_batched_tokens=16), WorkerModel(4)
    scheduler.add(make_request("a", 20, max_tokens=8))
    scheduler.update_from_output(worker.execute(scheduler.schedule()))
    scheduler.add(make_request("b", 24))
    assert shares(scheduler.schedule()) == {"a": 4}  # a chunk of b would fit, all of b would not


def test_priority_overtakes_the_queue_and_chooses_the_victim(make_scheduler, make_request):
    scheduler = make_scheduler(scheduling_policy="priority", max_num_seqs=1)
    scheduler.add(make_request("low", 4, priority=9))
    scheduler.add(make_request("high", 4, priority=1))
    assert list(shares(scheduler.schedule())) == ["high"]


@pytest.mark.parametrize("name", POLICIES.discover())
def test_every_policy_answers_every_request(make_scheduler, make_request, name):
    scheduler = make_scheduler(scheduling_policy=name, num_blocks=16)
    requests = [make_request(letter, 6 + i, max_tokens=12, priority=i % 3) for i, letter in enumerate("abcdefg")]
    for request in requests:
        scheduler.add(request)
    assert len(run_to_end(scheduler, 2)) == len(requests)


@pytest.mark.parametrize("drafts", [0, 7])
def test_end_of_text_and_stop_ids_end_a_request_unless_told_otherwise(make_scheduler, make_request, drafts):
    prompt = [3, 1, 4]
    third = expected_tokens(prompt, 8)[2]
    cases = {
        "eos": make_request("eos", prompt, 8, eos_token_ids=frozenset({third})),
        "stop": make_request("stop", prompt, params=SamplingParams(max_tokens=8, stop_token_ids=(third,))),
        "ignore": make_request(
            "ignore", prompt, params=SamplingParams(max_tokens=8, ignore_eos=True), eos_token_ids=frozenset({third})
        ),
    }
    scheduler = make_scheduler(num_speculative_tokens=drafts)
    for request in cases.values():
        scheduler.add(request)
    ended = run_to_end(scheduler, 2)
    assert ended == {"eos": FinishReason.STOP, "stop": FinishReason.STOP, "ignore": FinishReason.LENGTH}
    assert [len(request.output_token_ids) for request in cases.values()] == [3, 3, 8]


def test_zero_tokens_compute_the_prompt_and_finish(make_scheduler, make_request):
    scheduler = make_scheduler(max_num_batched_tokens=8)
    request = make_request("a", 20, max_tokens=0)
    scheduler.add(request)
    assert run_to_end(scheduler, 2) == {"a": FinishReason.LENGTH}
    assert request.output_token_ids == []


def test_an_aborted_request_gives_its_blocks_back_at_once_and_the_worker_forgets_it(make_scheduler, make_request):
    scheduler, worker = make_scheduler(), WorkerModel(4)
    scheduler.add(make_request("a", 20, max_tokens=50))
    result = worker.execute(scheduler.schedule())
    scheduler.finish("a", FinishReason.ABORT)
    assert scheduler.cache.pool.num_free == scheduler.cache.pool.num_usable
    assert scheduler.update_from_output(result) == []  # its step was in flight: the token goes nowhere
    scheduler.add(make_request("a", 5))  # the same name again, at once
    plan = scheduler.schedule()
    assert plan.dropped_request_ids == ["a"]
    assert [new.request_id for new in plan.new_requests] == ["a"]
    worker.execute(plan)


def test_aborting_what_is_not_there_is_harmless(make_scheduler):
    assert make_scheduler().finish("nobody", FinishReason.ABORT) is None


def test_siblings_wait_for_the_prompt_and_share_its_blocks(make_scheduler, make_request):
    scheduler, worker = make_scheduler(max_num_batched_tokens=8), WorkerModel(4)
    prompt = list(range(10))
    parent = make_request("p", prompt, max_tokens=6)
    children = [make_request(f"c{i}", prompt, max_tokens=6, parent_id="p") for i in range(3)]
    for request in (parent, *children):
        scheduler.add(request)
    assert shares(scheduler.schedule()) == {"p": 8}
    assert shares(scheduler.schedule()) == {"p": 2}
    plan = scheduler.schedule()
    assert shares(plan) == {"p": 1, "c0": 1, "c1": 1, "c2": 1}
    assert [new.block_ids[:2] for new in plan.new_requests] == [[1, 2]] * 3
    # Four owners of the half-filled block 3 write: three copy it, the last one has it to itself.
    assert len(plan.block_copies) == 3
    assert worker.block_size == 4


@pytest.mark.parametrize("drafts", [0, 5])
def test_siblings_get_the_answers_they_would_get_alone(make_scheduler, make_request, drafts):
    scheduler = make_scheduler(num_blocks=14, num_speculative_tokens=drafts)
    prompt = list(range(10))
    requests = [make_request("p", prompt, max_tokens=9)]
    requests += [make_request(f"c{i}", prompt, max_tokens=9, parent_id="p") for i in range(4)]
    for request in requests:
        scheduler.add(request)
    run_to_end(scheduler, 2)
    for request in requests:
        assert request.output_token_ids == expected_tokens(prompt, 9)


def test_siblings_go_on_when_the_parent_is_aborted_before_its_prompt_is_computed(make_scheduler, make_request):
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("p", list(range(10))))
    scheduler.add(make_request("c", list(range(10)), parent_id="p"))
    scheduler.finish("p", FinishReason.ABORT)
    assert run_to_end(scheduler) == {"c": FinishReason.LENGTH}


def test_what_a_failed_request_computed_is_found_by_nobody(make_scheduler, make_request):
    scheduler, worker = make_scheduler(max_num_batched_tokens=8), WorkerModel(4)
    scheduler.add(make_request("a", 12))
    scheduler.update_from_output(worker.execute(scheduler.schedule()))  # two blocks, findable until it fails
    output = worker.execute(scheduler.schedule())
    output.failed["a"] = "its logits are NaN"
    scheduler.update_from_output(output)
    again = make_request("again", 12)
    scheduler.add(again)
    assert shares(scheduler.schedule()) == {"again": 8} and again.num_cached_tokens == 0


def test_a_request_that_failed_alone_leaves_the_others_running(make_scheduler, make_request):
    scheduler, worker = make_scheduler(), WorkerModel(4)
    scheduler.add(make_request("a", 5))
    scheduler.add(make_request("b", 6))
    output = worker.execute(scheduler.schedule())
    output.failed["a"] = "its logits are NaN"
    index = output.request_ids.index("a")
    del output.request_ids[index], output.sampled_token_ids[index]
    updates = {update.request.request_id: update for update in scheduler.update_from_output(output)}
    assert updates["a"].finish_reason is FinishReason.ERROR
    assert updates["b"].finish_reason is None
    assert list(scheduler.requests) == ["b"]


@pytest.mark.parametrize("drafts", [0, 4])
def test_lost_steps_are_replayed_to_the_same_tokens(make_scheduler, make_request, drafts):
    scheduler, worker = make_scheduler(num_speculative_tokens=drafts), WorkerModel(4)
    requests = [make_request(name, 6, max_tokens=9) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    for _ in range(3):
        scheduler.update_from_output(worker.execute(scheduler.schedule()))
    scheduler.schedule(), scheduler.schedule()  # two steps in flight, never answered
    assert scheduler.recover(workers_lost=True) == []
    # Nothing is in flight any more: nobody keeps room for guesses that nobody makes.
    assert {(r.num_inflight_steps, r.num_inflight_tokens, r.num_inflight_drafts) for r in requests} == {(0, 0, 0)}
    run_to_end(scheduler, 2)
    for request in requests:
        assert request.output_token_ids == expected_tokens(request.prompt_token_ids, 9)


def run_with_poison(scheduler, kills, limit: int = 3000) -> tuple[int, list[str], int]:
    """Run to the end on workers that die in steps for which `kills(plan)`: steps, who was given up, deaths."""
    worker, given_up, deaths = WorkerModel(4), [], 0
    for num_steps in range(limit):
        plan = scheduler.schedule()
        if plan is None:
            assert not scheduler.has_work()
            return num_steps, given_up, deaths
        if kills(plan):
            deaths += 1
            given_up += [update.request.request_id for update in scheduler.recover(workers_lost=True)]
            worker = WorkerModel(4)
        else:
            scheduler.update_from_output(worker.execute(plan))
        scheduler.cache.check_integrity()
    raise AssertionError("no end")


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("in_decode_alone", [False, True])
def test_the_request_that_kills_the_worker_is_given_up_and_the_others_go_on_together(
    make_scheduler, make_request, position, in_decode_alone
):
    scheduler = make_scheduler(num_blocks=200)
    names = ["a", "b", "c", "d"]
    names.insert(position, "poison")
    requests = {name: make_request(name, 6 + i, max_tokens=100) for i, name in enumerate(names)}
    for request in requests.values():
        scheduler.add(request)

    def kills(plan) -> bool:
        return "poison" in shares(plan) and (not in_decode_alone or shares(plan)["poison"] == 1)

    num_steps, given_up, deaths = run_with_poison(scheduler, kills)
    assert (given_up, deaths) == (["poison"], 3)
    for name in "abcd":
        assert requests[name].output_token_ids == expected_tokens(requests[name].prompt_token_ids, 100)
    assert num_steps < 150  # one after the other they would take 400


def test_a_suspect_has_its_steps_to_itself(make_scheduler, make_request):
    scheduler = make_scheduler(max_num_batched_tokens=8)
    for name in "ab":
        scheduler.add(make_request(name, 10, max_tokens=10))
    for _ in range(2):
        scheduler.schedule()
        scheduler.recover(workers_lost=True)  # of these steps, a is the only suspect
    worker = WorkerModel(4)
    seen = []
    for _ in range(6):
        plan = scheduler.schedule()
        seen.append(shares(plan))
        scheduler.update_from_output(worker.execute(plan))
    assert seen == [{"a": 8}, {"a": 2}, {"a": 1}, {"a": 1, "b": 7}, {"a": 1, "b": 3}, {"a": 1, "b": 1}]
    assert scheduler.num_preemptions == 2


def test_a_full_cache_of_mixed_lengths_wastes_under_four_percent(make_scheduler, make_request):
    scheduler, worker = make_scheduler(
        num_blocks=1200, block_size=8, max_num_seqs=64, max_num_batched_tokens=512
    ), WorkerModel(8)  # fmt: skip
    for i in range(60):
        scheduler.add(make_request(f"r{i}", [i * 7 + j for j in range(100 + (i * 37) % 250)], max_tokens=40))
    wastes = []
    while scheduler.has_work():
        plan = scheduler.schedule()
        scheduler.update_from_output(worker.execute(plan))
        pool = scheduler.cache.pool
        used = pool.num_usable - pool.num_free
        if used > 0.95 * pool.num_usable:
            held = {}
            for request in scheduler.running:
                for index, block in enumerate(scheduler.cache.block_ids(request)):
                    held[block] = max(held.get(block, 0), min(request.num_computed_tokens - index * 8, 8))
            wastes.append(1 - sum(held.values()) / (used * 8))
    assert wastes and max(wastes) < 0.04
