"""Random histories of the KV cache, against a model that tracks what each slot of each block holds."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from servd.cache.kv_cache_manager import KVCacheManager
from servd.request import Request
from servd.sampling_params import SamplingParams

BLOCK = 4
NUM_BLOCKS = 24


class CacheMachine(RuleBasedStateMachine):
    """Plays the scheduler and the worker: allocates, "writes" tokens into slots, and checks what a reader would see."""

    def __init__(self):
        super().__init__()
        self.manager = KVCacheManager(NUM_BLOCKS, BLOCK)
        self.memory: dict[int, list] = {i: [None] * BLOCK for i in range(NUM_BLOCKS)}
        self.live: dict[str, tuple[Request, int]] = {}  # request and its computed tokens
        self.pins: dict[str, Request] = {}  # whose prompts must stay findable
        self.count = 0

    def compute(self, request: Request, computed: int, num_new: int) -> bool:
        allocation = self.manager.allocate_slots(request, computed, num_new)
        if allocation is None:
            return False
        for source, destination in allocation.copies:
            self.memory[destination] = list(self.memory[source])
        tokens, table = request.all_token_ids(), self.manager.block_ids(request)
        for position in range(computed, computed + num_new):
            block = table[position // BLOCK]
            owners = [r for r, _ in self.live.values() if block in self.manager.block_ids(r)]
            assert len([r for r in owners if r is not request]) == 0, f"writes into block {block} of {owners}"
            self.memory[block][position % BLOCK] = tuple(tokens[: position + 1])
        self.live[request.request_id] = (request, computed + num_new)
        self.manager.cache_full_blocks(request, computed + num_new)
        return True

    @rule(kind=st.integers(0, 2), length=st.integers(1, 30), salt=st.sampled_from(["", "t"]), chunk=st.integers(1, 30))
    def add(self, kind, length, salt, chunk):
        self.count += 1
        tokens = [kind] * length if kind else list(range(length))
        params = SamplingParams(max_tokens=100)
        request = Request(f"r{self.count}", tokens, params, max_model_len=500, cache_salt=salt)
        cached = self.manager.attach_cached_prefix(request)
        assert cached < length
        self.live[request.request_id] = (request, cached)
        if not self.compute(request, cached, min(chunk, length - cached)):
            self.manager.free(request)
            del self.live[request.request_id]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), chunk=st.integers(1, 9))
    def step(self, data, chunk):
        request, computed = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        if computed == request.num_tokens:
            request.output_token_ids.append(random.Random(request.num_tokens).randrange(5))
        self.compute(request, computed, min(chunk, request.num_tokens - computed))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data):
        parent, computed = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        if computed < parent.num_prompt_tokens:
            return
        self.count += 1
        child = Request(
            f"r{self.count}", parent.prompt_token_ids, parent.sampling_params, max_model_len=500,
            cache_salt=parent.cache_salt,
        )  # fmt: skip
        self.live[child.request_id] = (child, self.manager.fork(parent, child, parent.num_prompt_tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 4), min_size=1, max_size=4))
    def fork_beams(self, data, tokens):
        """Children go on from all that the parent computed, each with a token of its own; the parent ends."""
        parent, computed = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        if computed < parent.num_tokens:
            return
        for token in tokens:
            self.count += 1
            child = Request(
                f"r{self.count}", [*parent.all_token_ids(), token], parent.sampling_params, max_model_len=500,
                cache_salt=parent.cache_salt,
            )  # fmt: skip
            assert self.manager.fork(parent, child, computed) == computed
            self.live[child.request_id] = (child, computed)
        self.manager.free(self.live.pop(parent.request_id)[0])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def finish_or_preempt(self, data):
        request, _ = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.manager.free(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def pin(self, data):
        request, computed = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        if computed == request.num_tokens and not request.output_token_ids:
            self.count += 1
            self.pins[f"p{self.count}"] = request
            self.manager.pin(f"p{self.count}", request)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        name = data.draw(st.sampled_from(sorted(self.pins)))
        del self.pins[name]
        self.manager.unpin(name)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fail(self, data):
        request, _ = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        self.manager.forget_computed(request)
        self.manager.free(request)

    @rule()
    def evict(self):
        free = self.manager.pool.num_free
        self.manager.pool.free(self.manager.pool.allocate(free))

    @invariant()
    def consistent(self):
        self.manager.check_integrity()
        for request, computed in self.live.values():
            tokens, table = request.all_token_ids(), self.manager.block_ids(request)
            for position in range(computed):
                held = self.memory[table[position // BLOCK]][position % BLOCK]
                assert held == tuple(tokens[: position + 1]), f"{request} reads {held} at {position}"

        for request in self.pins.values():
            probe = Request("probe", [*request.prompt_token_ids, 1], SamplingParams(), max_model_len=500,
                            cache_salt=request.cache_salt)  # fmt: skip
            found = self.manager.attach_cached_prefix(probe)
            assert found >= request.num_prompt_tokens // BLOCK * BLOCK, f"{request} is pinned, {found} are found"
            table = self.manager.block_ids(probe)
            for position in range(found):
                held = self.memory[table[position // BLOCK]][position % BLOCK]
                assert held == tuple(probe.prompt_token_ids[: position + 1]), f"a pin reads {held} at {position}"
            self.manager.free(probe)

    def teardown(self):
        for name in self.pins:
            self.manager.unpin(name)
        for request, _ in self.live.values():
            self.manager.free(request)
        self.manager.check_integrity()
        assert self.manager.pool.num_free == NUM_BLOCKS - 1


TestCacheStateful = CacheMachine.TestCase
TestCacheStateful.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
