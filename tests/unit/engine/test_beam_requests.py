"""The requests behind a search, step by step over a real scheduler: their place among others, and what errors end."""

from servd.cache.kv_cache_manager import KVCacheManager
from servd.config import SchedulerConfig
from servd.engine.answers import new_answers
from servd.engine.beam_search import BeamSearches
from servd.outputs import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from servd.request import FinishReason, Request
from servd.sampling_params import SamplingParams
from servd.scheduler.plan import Update
from servd.scheduler.scheduler import Scheduler

PROMPT = list(range(12))


class Searching:
    """A search of two beams that has begun; whatever a beam holds, tokens 5 and 6 are likeliest."""

    def __init__(self, priority: int = 0, cache_salt: str = "", **config) -> None:
        config = {"max_num_seqs": 4, "max_num_batched_tokens": 10, "num_speculative_tokens": 0, **config}
        cache = KVCacheManager(50, 4, enable_prefix_caching=bool(cache_salt))
        self.scheduler = Scheduler(SchedulerConfig(**config), cache)
        self.beams = BeamSearches(self.scheduler)
        params = SamplingParams(n=2, use_beam_search=True, max_tokens=8, ignore_eos=True)
        self.beams.start(
            new_answers(
                "s", 2, PROMPT, params, seed=0, eos_token_ids=frozenset(), max_model_len=100, priority=priority,
                cache_salt=cache_salt, pin_id=None,
            )
        )  # fmt: skip

    def step(self, failed: str | None = None) -> list[Update]:
        plan = self.scheduler.schedule()
        assert plan is not None
        return self.beams.process(self.scheduler.update_from_output(self._result(plan, failed)))

    def _result(self, plan: SchedulerOutput, failed: str | None) -> ModelRunnerOutput:
        scheduled = plan.scheduled
        columns = zip(scheduled.request_ids, scheduled.samples, strict=True)
        names = [name for name, samples in columns if samples and name != failed]
        found = {name: [TokenLogprobs(5, -0.1, 1, [5, 6], [-0.1, -0.2])] for name in names}
        failures = {} if failed is None else {failed: "its logits are NaN"}
        return ModelRunnerOutput(plan.step_id, names, [5] * len(names), found, {}, failures, 0.001)

    def running(self) -> list[str]:
        return [request.request_id for request in self.scheduler.running]


def other(name: str, priority: int = 0) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(max_tokens=20), max_model_len=100, priority=priority)


def test_a_beam_that_fails_ends_those_that_are_still_being_computed():
    search = Searching()
    search.step()
    search.step()
    first, second = search.running()
    search.scheduler.preempt(search.scheduler.requests[second])  # it computes its prompt again, in two steps
    updates = search.step(failed=first)
    assert [(update.request.request_id, update.finish_reason) for update in updates] == [
        ("s#0", FinishReason.ERROR), ("s#1", FinishReason.ERROR),
    ]  # fmt: skip
    assert not search.scheduler.has_work()
    assert search.scheduler.cache.pool.num_free == search.scheduler.cache.pool.num_usable


def test_the_beams_of_an_earlier_search_stay_before_requests_that_came_later():
    search = Searching()
    search.scheduler.add(other("later"))
    for _ in range(4):
        search.step()
        assert search.running()[-1] == "later" or "later" not in search.running()
    assert len(search.running()) == 3


def test_beams_have_the_priority_of_their_search():
    search = Searching(priority=2, scheduling_policy="priority")
    for _ in range(3):
        search.step()
    search.scheduler.add(other("urgent", priority=1))
    search.step()
    assert search.running()[0] == "urgent" and len(search.running()) == 3


def test_what_a_search_computed_is_found_under_its_salt_alone():
    search = Searching(cache_salt="tenant")
    for _ in range(3):
        search.step()
    cache = search.scheduler.cache
    for salt, found in (("tenant", 12), ("", 0)):
        params = SamplingParams(max_tokens=1)
        probe = Request("probe", [*PROMPT, 1], params, max_model_len=100, cache_salt=salt)
        assert cache.attach_cached_prefix(probe) == found
        cache.free(probe)
