"""Requests whose grammars are not ready get no token in a step, and lose nothing but the step."""

from servd.request import FinishReason
from servd.sampling_params import SamplingParams
from tests.unit.scheduler.conftest import WorkerModel, expected_tokens, shares

CONSTRAINED = SamplingParams(max_tokens=6, allowed_token_ids=tuple(range(97)))


def test_a_deferred_request_computes_its_last_token_again_while_others_go_on(make_scheduler, make_request):
    scheduler, worker = make_scheduler(), WorkerModel(4, share_deferred=1.0)
    slow, other = make_request("slow", 8, params=CONSTRAINED), make_request("other", 5, max_tokens=4)
    scheduler.add(slow)
    scheduler.add(other)
    in_flight = [worker.execute(scheduler.schedule()), worker.execute(scheduler.schedule())]
    for _ in range(4):
        scheduler.update_from_output(in_flight.pop(0))
        in_flight.append(worker.execute(scheduler.schedule()))
    assert slow.output_token_ids == [] and other.output_token_ids == expected_tokens(other.prompt_token_ids, 4)
    assert other.finish_reason is FinishReason.LENGTH
    worker.share_deferred = 0.0
    while scheduler.has_work():
        plan = scheduler.schedule()
        if plan is not None:
            assert shares(plan) == {"slow": 1}
            in_flight.append(worker.execute(plan))
        scheduler.update_from_output(in_flight.pop(0))
    assert slow.output_token_ids == expected_tokens(slow.prompt_token_ids, 6)
    assert scheduler.num_preemptions == 0
    scheduler.cache.check_integrity()


def test_a_deferred_request_can_be_preempted_and_aborted(make_scheduler, make_request):
    scheduler, worker = make_scheduler(), WorkerModel(4, share_deferred=1.0)
    request = make_request("a", 8, params=CONSTRAINED)
    scheduler.add(request)
    first, second = worker.execute(scheduler.schedule()), worker.execute(scheduler.schedule())
    scheduler.preempt(request)
    scheduler.update_from_output(first)
    scheduler.update_from_output(second)
    assert shares(scheduler.schedule()) == {"a": 8}  # from the start: its blocks were given back
    scheduler.finish("a", FinishReason.ABORT)
    assert scheduler.cache.pool.num_free == scheduler.cache.pool.num_usable
