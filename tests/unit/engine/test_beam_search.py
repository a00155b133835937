"""Searches and best_of in the engine over the fakes: what ends them early, what they leave behind, what is ranked."""

import asyncio

import pytest

from servd.errors import DeadlineExceededError, EngineUnavailableError, OverloadedError, RequestFailedError
from servd.outputs import RequestOutput
from servd.request import FinishReason
from servd.sampling_params import SamplingParams
from tests.fakes import FakeEngine

SEARCH = SamplingParams(n=3, best_of=4, use_beam_search=True, max_tokens=40)
PROMPT = list(b"a prompt of thirty-five characters!")


async def answers_of(stream) -> dict[int, RequestOutput]:
    found: dict[int, RequestOutput] = {}
    async for output in stream:
        assert output.index not in found, "a search's answer comes whole"
        found[output.index] = output
    return found


def search(folder, *, prepare=None, params=SEARCH, settings=None, **options):
    """The answers to one search; nothing may be left behind. `prepare(fake)` runs once it is under way."""

    async def main():
        async with FakeEngine(folder, settings or {}, executor_options=options) as fake:
            async with fake.engine.generate(PROMPT, params, request_id="r", timeout=20.0) as stream:
                if prepare is not None:
                    await fake.wait_until(lambda: len(fake.executor.plans) >= 5)
                    await prepare(fake)
                found = await answers_of(stream)
            await fake.wait_idle()
            return found

    return asyncio.run(main())


def test_answers_come_whole_and_best_first(tmp_path):
    found = search(tmp_path)
    assert sorted(found) == [0, 1, 2]
    assert [len(found[i].token_ids) for i in range(3)] == [40] * 3
    assert [found[i].finish_reason for i in range(3)] == [FinishReason.LENGTH] * 3
    assert len({tuple(found[i].token_ids) for i in range(3)}) == 3
    assert {found[i].num_output_tokens for i in range(3)} == {40}
    assert found[0].text.encode() == bytes(found[0].token_ids)


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_worker_or_step_does_not_change_the_answers(tmp_path, lost):
    async def prepare(fake):
        if lost:
            fake.executor.die()
        else:
            failures = iter([True])

            def fail_once(plan):
                if next(failures, False):
                    raise RuntimeError("this step fails")

            fake.executor.on_step = fail_once

    expected = search(tmp_path)
    found = search(tmp_path, prepare=prepare, step_delay=0.002)
    assert {i: one.token_ids for i, one in found.items()} == {i: one.token_ids for i, one in expected.items()}


def test_an_abort_ends_all_beams_and_answers(tmp_path):
    async def abort(fake):
        assert fake.engine.abort("r")
        assert not fake.engine.core.scheduler.has_work(), "nothing is computed for nobody"

    found = search(tmp_path, prepare=abort, step_delay=0.002)
    assert sorted(found) == [0, 1, 2]
    for output in found.values():
        assert output.finish_reason is FinishReason.ABORT and isinstance(output.error, EngineUnavailableError)


def test_a_deadline_ends_a_search(tmp_path):
    async def main():
        async with FakeEngine(tmp_path, executor_options={"step_delay": 0.01}) as fake:
            found = await answers_of(fake.engine.generate(PROMPT, SEARCH, request_id="r", timeout=0.05))
            await fake.wait_idle()
            return found

    for output in asyncio.run(main()).values():
        assert isinstance(output.error, DeadlineExceededError)


def test_a_reader_who_leaves_ends_the_search(tmp_path):
    async def main():
        async with FakeEngine(tmp_path, executor_options={"step_delay": 0.002}) as fake:
            async with fake.engine.generate(PROMPT, SEARCH, request_id="r"):
                await fake.wait_until(lambda: fake.engine.stats().running == 4)
            await fake.wait_idle()
            assert len(await answers_of(fake.engine.generate(PROMPT, SEARCH, request_id="r"))) == 3
            await fake.wait_idle()

    asyncio.run(main())


def test_a_beam_that_cannot_be_computed_fails_its_search_alone(tmp_path):
    class FailsBeams:
        def __init__(self, fake):
            self.step = fake.executor._step
            self.num_left = 1

        def __call__(self, plan):
            output = self.step(plan)
            beams = [request_id for request_id in output.request_ids if request_id.startswith("r#")]
            if len(beams) == 4 and self.num_left:
                self.num_left = 0
                index = output.request_ids.index(beams[2])
                del output.request_ids[index], output.sampled_token_ids[index]
                output.failed[beams[2]] = "its logits are not numbers"
            return output

    async def main():
        async with FakeEngine(tmp_path, {"num_speculative_tokens": 0}) as fake:
            fake.executor._step = FailsBeams(fake)
            mate = fake.engine.generate(list(b"mate"), SamplingParams(max_tokens=50), request_id="mate")
            found = await answers_of(fake.engine.generate(PROMPT, SEARCH, request_id="r"))
            tokens = [token async for output in mate for token in output.token_ids]
            await fake.wait_idle()
            return found, tokens

    found, tokens = asyncio.run(main())
    assert len(tokens) == 50
    assert sorted(found) == [0, 1, 2]
    for output in found.values():
        assert isinstance(output.error, RequestFailedError) and "not numbers" in output.error.message


def test_many_searches_at_once_in_few_blocks_find_what_each_finds_alone(tmp_path):
    expected = {i: one.token_ids for i, one in search(tmp_path).items()}

    async def main():
        settings = {"block_size": 4, "max_num_seqs": 9, "max_model_len": 80}
        async with FakeEngine(tmp_path, settings, executor_options={"num_blocks": 32}) as fake:
            streams = [fake.engine.generate(PROMPT, SEARCH, request_id=f"r{i}") for i in range(6)]
            streams.append(fake.engine.generate(PROMPT, SamplingParams(n=3, max_tokens=30), request_id="n"))
            for stream in streams[:-1]:
                found = await answers_of(stream)
                fake.engine.core.scheduler.cache.check_integrity()
                assert {i: one.token_ids for i, one in found.items()} == expected
            async for _ in streams[-1]:
                pass
            await fake.wait_idle()
            assert fake.engine.core.scheduler.num_preemptions > 0

    asyncio.run(main())


def test_beams_count_for_the_queue(tmp_path):
    async def main():
        async with FakeEngine(tmp_path, {"max_num_queued_reqs": 4}, executor_options={"step_delay": 0.002}) as fake:
            fake.executor.gate.clear()
            streams = [fake.engine.generate(PROMPT, SEARCH, request_id=f"{i}") for i in range(1)]
            with pytest.raises(OverloadedError):
                fake.engine.generate(PROMPT, SEARCH, request_id="x")
            fake.executor.gate.set()
            assert len(await answers_of(streams[0])) == 3
            await fake.wait_idle()

    asyncio.run(main())


# -- best_of -------------------------------------------------------------------------------------------------------



def test_best_of_gives_the_answers_with_the_highest_mean_logprob(tmp_path):
    """The fake's log-probabilities are all alike, so the order is that of the answers; lengths must not matter."""
    params = SamplingParams(n=2, best_of=5, max_tokens=12, seed=7)

    async def main():
        async with FakeEngine(tmp_path) as fake:
            ranked: dict[str, float] = {}
            step = fake.executor._step

            def with_logprobs(plan):
                output = step(plan)
                for request_id, entries in output.logprobs.items():
                    value = -abs(int(request_id.split("#")[1]) - 3) - 1.0  # the fourth is the best, then its neighbours
                    ranked[request_id] = value
                    for entry in entries:
                        entry.logprob = value
                return output

            fake.executor._step = with_logprobs
            every = {}
            wide = SamplingParams(n=5, max_tokens=12, seed=7)
            async for output in fake.engine.generate(PROMPT, wide, request_id="all"):
                every.setdefault(output.index, []).extend(output.token_ids)
            best = await answers_of(fake.engine.generate(PROMPT, params, request_id="best"))
            await fake.wait_idle()
            return every, best

    every, best = asyncio.run(main())
    assert [best[i].token_ids for i in sorted(best)] == [every[3], every[2]]
    assert best[0].logprobs == [], "they were not asked for"


def test_an_abort_of_best_of_ends_the_n_answers(tmp_path):
    async def abort(fake):
        assert fake.engine.abort("r")

    params = SamplingParams(n=2, best_of=4, max_tokens=200)
    found = search(tmp_path, prepare=abort, params=params, step_delay=0.002)
    assert sorted(found) == [0, 1]
    assert all(isinstance(one.error, EngineUnavailableError) for one in found.values())
