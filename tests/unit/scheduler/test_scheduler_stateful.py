"""Random histories of the scheduler over a checking worker: nothing is lost, stuck, or computed from stale slots."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from servd.cache.kv_cache_manager import KVCacheManager
from servd.cache.prefix_hash import block_hash, root_hash
from servd.config import SchedulerConfig
from servd.request import FinishReason, Request
from servd.sampling_params import SamplingParams
from servd.scheduler.scheduler import Scheduler
from tests.unit.scheduler.conftest import WorkerModel, expected_tokens


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_tokens=st.integers(44, 160),
        block=st.sampled_from([1, 4, 16, 256]),
        max_num_seqs=st.sampled_from([1, 6]),
        policy=st.sampled_from(["fcfs", "priority"]),
        budget=st.integers(6, 40),
        caching=st.booleans(),
        threshold=st.sampled_from([0, 5]),
        drafts=st.sampled_from([0, 1, 4, 20]),
        share_deferred=st.sampled_from([0.2, 0.7]),
        share=st.sampled_from([0, 0.3, 0.8]),
    )
    def start(self, num_tokens, block, max_num_seqs, policy, budget, caching, threshold, drafts, share_deferred, share):
        num_blocks = -(-num_tokens // block) + 1  # of 256 tokens, just one that can be used
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, scheduling_policy=policy,
            long_prefill_token_threshold=threshold, num_speculative_tokens=drafts,
        )  # fmt: skip
        self.scheduler = Scheduler(config, KVCacheManager(num_blocks, block, enable_prefix_caching=caching))
        self.worker = WorkerModel(block, share_deferred)
        self.results = []
        self.everyone: dict[str, Request] = {}
        self.ended: dict[str, FinishReason] = {}
        self.max_pinned = int((num_blocks - 1) * share) if caching else 0
        self.longest = min((num_blocks - 1 - self.max_pinned) * block, num_tokens)
        self.pins: dict[str, int] = {}  # name → blocks
        self.kept: list[Request] = []  # complete, with blocks that a fork may take

    @rule(
        kind=st.integers(0, 2), length=st.integers(1, 30), max_tokens=st.integers(0, 12), n=st.integers(1, 3),
        priority=st.integers(0, 2), stop=st.booleans(), constrained=st.booleans(),
    )  # fmt: skip
    def add(self, kind, length, max_tokens, n, priority, stop, constrained):
        max_tokens = min(max_tokens, self.longest - 1)  # pinned blocks may leave little room
        prompt = [(kind * 13 + i * kind) % 90 for i in range(min(length, self.longest - max_tokens))]
        stop_ids = tuple(expected_tokens(prompt, 5)[4:]) if stop else ()
        allowed = tuple(range(97)) if constrained else None  # all there are: such requests are deferred now and then
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_ids, allowed_token_ids=allowed)
        names = [f"r{len(self.everyone) + i}" for i in range(n)]
        for name in names:
            request = Request(
                name, prompt, params, max_model_len=self.longest, priority=priority,
                parent_id=names[0] if name != names[0] else None,
            )  # fmt: skip
            self.everyone[name] = request
            self.scheduler.add(request)

    @rule(kind=st.integers(0, 2), length=st.integers(1, 30))
    def pin(self, kind, length):
        prompt = [(kind * 13 + i * kind) % 90 for i in range(min(length, self.longest))]
        num_blocks = len(prompt) // self.worker.block_size
        if num_blocks and sum(self.pins.values()) + num_blocks <= self.max_pinned:
            name = f"r{len(self.everyone)}"
            self.pins[name] = num_blocks
            self.everyone[name] = Request(
                name, prompt[: num_blocks * self.worker.block_size], SamplingParams(max_tokens=0),
                max_model_len=self.longest, pin_id=name,
            )  # fmt: skip
            self.scheduler.add(self.everyone[name])

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        name = data.draw(st.sampled_from(sorted(self.pins)))
        if name not in self.scheduler.requests:
            del self.pins[name]
            self.scheduler.cache.unpin(name)

    @rule(length=st.integers(1, 30), priority=st.integers(0, 2))
    def add_root_of_forks(self, length, priority):
        prompt = [(5 * i) % 90 for i in range(min(length, self.longest - 1))]
        params = SamplingParams(max_tokens=1)
        request = Request(
            f"r{len(self.everyone)}", prompt, params, max_model_len=self.longest, priority=priority, keeps_blocks=True
        )
        self.everyone[request.request_id] = request
        self.scheduler.add(request)

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), children=st.lists(st.tuples(st.integers(0, 96), st.integers(0, 2)), max_size=4))
    def fork(self, data, children):
        parent = self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))
        for token, priority in children if parent.num_tokens < self.longest else ():
            child = Request(
                f"r{len(self.everyone)}", [*parent.prompt_token_ids, token], parent.sampling_params,
                max_model_len=self.longest, priority=priority, keeps_blocks=True,
            )  # fmt: skip
            self.everyone[child.request_id] = child
            self.scheduler.fork(parent, child)
        self.scheduler.release(parent)

    @precondition(lambda self: len(self.results) < 2)
    @rule()
    def plan(self):
        plan = self.scheduler.schedule()
        if plan is not None:
            assert plan.num_tokens <= self.scheduler.config.max_num_batched_tokens
            assert len(set(plan.scheduled.request_ids)) == len(plan.scheduled.request_ids)
            assert len(plan.scheduled.request_ids) <= self.scheduler.config.max_num_seqs
            granted = plan.scheduled.num_draft_tokens
            assert max(granted, default=0) <= self.scheduler.config.num_speculative_tokens
            sources, destinations = {pair[0] for pair in plan.block_copies}, [pair[1] for pair in plan.block_copies]
            assert len(set(destinations)) == len(destinations), "two copies into one block"
            assert not sources & set(destinations), "the order of the copies would matter"
            self.results.append(self.worker.execute(plan))

    @precondition(lambda self: self.results)
    @rule()
    def take_result(self):
        for update in self.scheduler.update_from_output(self.results.pop(0)):
            if update.finish_reason is not None:
                self.ended[update.request.request_id] = update.finish_reason
            if update.finish_reason is FinishReason.LENGTH and update.request.keeps_blocks:
                self.kept.append(update.request)

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.finish(name, FinishReason.ABORT)
        self.ended[name] = FinishReason.ABORT

    @precondition(lambda self: len(self.scheduler.running))
    @rule(data=st.data())
    def preempt(self, data):
        running = {request.request_id: request for request in self.scheduler.running}
        self.scheduler.preempt(running[data.draw(st.sampled_from(sorted(running)))])

    @rule(lost=st.booleans())
    def lose_steps(self, lost):
        self.results.clear()
        for update in self.scheduler.recover(workers_lost=lost):
            self.ended[update.request.request_id] = update.finish_reason
        if lost:
            self.worker = WorkerModel(self.worker.block_size, self.worker.share_deferred)

    @invariant()
    def what_is_findable_was_written(self):
        size = self.worker.block_size
        for block in self.scheduler.cache.pool.blocks:
            if block.block_hash is not None:
                tokens, found = self.worker.memory[block.block_id, size - 1], root_hash("")
                for begin in range(0, len(tokens), size):
                    found = block_hash(found, list(tokens[begin : begin + size]))
                assert found == block.block_hash, f"{block} holds {tokens}"

    @invariant()
    def consistent(self):
        self.scheduler.cache.check_integrity()
        for request in self.everyone.values():
            expected = expected_tokens(request.prompt_token_ids, len(request.output_token_ids))
            assert request.output_token_ids == expected, f"{request} went astray"
            assert (request.request_id in self.ended) == (request.request_id not in self.scheduler.requests)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.has_work() and not self.results:
                break
            self.plan()
            if self.results:
                self.take_result()
        for request in self.kept:
            self.scheduler.release(request)
        assert not self.scheduler.has_work(), f"stuck: {list(self.scheduler.requests.values())}"
        assert set(self.ended) == set(self.everyone)
        for name in self.pins:
            self.scheduler.cache.unpin(name)
        pool = self.scheduler.cache.pool
        assert pool.num_free == pool.num_usable
        self.consistent()


TestSchedulerStateful = SchedulerMachine.TestCase
TestSchedulerStateful.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
