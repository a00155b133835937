"""Requests that go on in the blocks of a complete one, as beams do: one token each, copies only of what both write."""

from servd.request import FinishReason, Request
from servd.sampling_params import SamplingParams
from servd.scheduler.plan import Update
from servd.scheduler.scheduler import GIVEN_UP, Scheduler
from tests.unit.scheduler.conftest import WorkerModel, shares

ONE_TOKEN = SamplingParams(max_tokens=1)


def one_token_request(name: str, tokens: list[int], priority: int = 0) -> Request:
    return Request(name, tokens, ONE_TOKEN, max_model_len=400, keeps_blocks=True, priority=priority)


def step(scheduler: Scheduler, worker: WorkerModel) -> list[Update]:
    plan = scheduler.schedule()
    assert plan is not None
    updates = scheduler.update_from_output(worker.execute(plan))
    scheduler.cache.check_integrity()
    return updates


def children_of(parent: Request, count: int) -> list[Request]:
    tokens = parent.prompt_token_ids
    return [one_token_request(f"{parent.request_id}.{i}", [*tokens, i]) for i in range(count)]


def test_children_compute_their_last_token_alone_and_share_all_full_blocks(make_scheduler):
    scheduler, worker = make_scheduler(), WorkerModel(4)
    root = one_token_request("root", list(range(10)))
    scheduler.add(root)
    assert [update.finish_reason for update in step(scheduler, worker)] == [FinishReason.LENGTH]
    assert scheduler.cache.pool.num_usable - scheduler.cache.pool.num_free == 3, "kept for the children"
    children = children_of(root, 3)
    for child in children:
        scheduler.fork(root, child)
    scheduler.release(root)
    plan = scheduler.schedule()
    assert shares(plan) == {"root.0": 1, "root.1": 1, "root.2": 1}
    assert len(plan.block_copies) == 2, "the last one to write has the block for itself"
    assert len({tuple(new.block_ids[:2]) for new in plan.new_requests}) == 1
    scheduler.update_from_output(worker.execute(plan))
    for child in children:
        scheduler.release(child)
    scheduler.cache.check_integrity()
    assert scheduler.cache.pool.num_free == scheduler.cache.pool.num_usable


def test_a_fork_after_lost_workers_is_computed_anew(make_scheduler):
    scheduler, worker = make_scheduler(), WorkerModel(4)
    root = one_token_request("root", list(range(10)))
    scheduler.add(root)
    step(scheduler, worker)
    scheduler.recover(workers_lost=True)
    (child,) = children_of(root, 1)
    scheduler.fork(root, child)
    scheduler.release(root)
    plan = scheduler.schedule()
    assert shares(plan) == {"root.0": 11}
    scheduler.update_from_output(WorkerModel(4).execute(plan))
    assert child.finish_reason is FinishReason.LENGTH


def test_kept_blocks_give_way_when_nothing_else_could_run(make_scheduler):
    scheduler, worker = make_scheduler(num_blocks=6), WorkerModel(4)  # 20 tokens
    root = one_token_request("root", list(range(15)))
    scheduler.add(root)
    step(scheduler, worker)
    other = Request("other", [7] * 15, ONE_TOKEN, max_model_len=400)
    scheduler.add(other)
    step(scheduler, worker)
    assert other.finish_reason is FinishReason.LENGTH
    (child,) = children_of(root, 1)
    scheduler.fork(root, child)
    scheduler.release(root)
    step(scheduler, worker)
    assert child.finish_reason is FinishReason.LENGTH


def test_a_block_that_is_copied_is_not_the_target_of_another_copy_of_the_step(make_scheduler):
    scheduler, worker = make_scheduler(num_blocks=6, scheduling_policy="priority"), WorkerModel(4)
    roots = [one_token_request("p", [1] * 6), one_token_request("q", [2] * 6)]
    for root in roots:
        scheduler.add(root)
    step(scheduler, worker)
    children = {}
    for name, root, priority in (("a", roots[0], 0), ("b", roots[0], 2), ("c", roots[1], 1), ("d", roots[1], 1)):
        children[name] = one_token_request(name, [*root.prompt_token_ids, len(children)], priority)
        scheduler.fork(root, children[name])
    for root in roots:
        scheduler.release(root)
    for _ in range(8):
        plan = scheduler.schedule()
        if plan is None:
            break
        sources, targets = {pair[0] for pair in plan.block_copies}, {pair[1] for pair in plan.block_copies}
        assert not sources & targets
        for update in scheduler.update_from_output(worker.execute(plan)):
            scheduler.release(update.request)
        scheduler.cache.check_integrity()
    assert {child.finish_reason for child in children.values()} == {FinishReason.LENGTH}


def test_an_aborted_fork_that_never_ran_is_not_taken_to_the_workers(make_scheduler):
    scheduler, worker = make_scheduler(), WorkerModel(4)
    root = one_token_request("root", list(range(10)))
    scheduler.add(root)
    step(scheduler, worker)
    first, second = children_of(root, 2)
    scheduler.fork(root, first)
    scheduler.fork(root, second)
    scheduler.release(root)
    scheduler.finish("root.0", FinishReason.ABORT)
    plan = scheduler.schedule()
    assert plan.dropped_request_ids == ["root"] and not plan.block_copies
    assert shares(plan) == {"root.1": 1}


def test_a_line_of_forks_that_kills_the_workers_is_given_up(make_scheduler):
    """Each is replayed from a prompt that does no harm: only counted along the line do the deaths add up."""
    scheduler, worker = make_scheduler(), WorkerModel(4)
    request = one_token_request("r", list(range(6)))
    scheduler.add(request)
    errors: list[str | None] = []
    for _ in range(12):
        if not scheduler.has_work():
            break
        plan = scheduler.schedule()
        if shares(plan).get(request.request_id) == 1:  # a decode step
            errors += [update.error for update in scheduler.recover(workers_lost=True)]
            worker = WorkerModel(4)
            continue
        scheduler.update_from_output(worker.execute(plan))
        if request.finish_reason is FinishReason.LENGTH:
            parent, (request,) = request, children_of(request, 1)
            scheduler.fork(parent, request)
            scheduler.release(parent)
    assert errors == [GIVEN_UP]


def test_a_fork_that_finds_no_seat_waits_and_is_computed_anew(make_scheduler):
    scheduler, worker = make_scheduler(max_num_seqs=2), WorkerModel(4)
    root = one_token_request("root", list(range(10)))
    scheduler.add(root)
    step(scheduler, worker)
    children = children_of(root, 3)
    for child in children:
        scheduler.fork(root, child)
    scheduler.release(root)
    assert (len(scheduler.running), len(scheduler.waiting)) == (2, 1)
    assert len(step(scheduler, worker)) == 2
    for child in children[:2]:
        scheduler.release(child)
    step(scheduler, worker)
    assert [child.finish_reason for child in children] == [FinishReason.LENGTH] * 3
    scheduler.release(children[2])
    assert scheduler.cache.pool.num_free == scheduler.cache.pool.num_usable


def test_kept_blocks_give_way_before_the_last_running_request_does(make_scheduler, make_request):
    scheduler, worker = make_scheduler(num_blocks=6), WorkerModel(4)  # 20 tokens
    root, other = one_token_request("root", list(range(7))), make_request("other", 10, max_tokens=8)
    scheduler.add(root)
    step(scheduler, worker)
    scheduler.add(other)
    while scheduler.has_work():
        step(scheduler, worker)
    assert other.finish_reason is FinishReason.LENGTH and scheduler.num_preemptions == 0
    (child,) = children_of(root, 1)
    scheduler.fork(root, child)
    scheduler.release(root)
    step(scheduler, worker)
    assert child.finish_reason is FinishReason.LENGTH


def test_a_line_of_forks_that_got_past_a_death_is_no_suspect(make_scheduler):
    scheduler, worker = make_scheduler(), WorkerModel(4)
    request = one_token_request("r", list(range(6)))
    scheduler.add(request)
    scheduler.schedule()
    scheduler.recover(workers_lost=True)
    step(scheduler, worker)
    assert request.num_worker_deaths == 1, "its prefill is no proof"
    (child,) = children_of(request, 1)
    scheduler.fork(request, child)
    scheduler.release(request)
    step(scheduler, worker)
    assert child.num_worker_deaths == 0
