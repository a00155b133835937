"""What goes wrong in the engine's surroundings, over a fake worker: bad starts, odd restarts, broken invariants."""

import asyncio
import itertools
import logging

import pytest

from servd.engine.async_engine import AsyncEngine
from servd.errors import ConfigError, EngineUnavailableError, RequestFailedError, WorkerDied
from servd.request import FinishReason
from servd.sampling_params import SamplingParams
from tests.fakes import FakeEngine, FakeExecutor
from tests.unit.engine.test_async_engine import GREEDY, answer, run


class GatedStart(FakeExecutor):
    """Its start ends when the test says so."""

    started = asyncio.Event()

    async def start(self, progress=None):
        info = await super().start(progress)
        await self.started.wait()
        return info


@pytest.mark.parametrize("end", [AsyncEngine.close, lambda engine: engine.drain(1.0)])
def test_an_engine_that_is_ended_while_it_starts_does_not_become_ready(tmp_path, end):
    async def main():
        fake = FakeEngine(tmp_path)
        async with fake:
            await fake.engine.close()
        executor = GatedStart(fake.engine.config)
        executor.started = asyncio.Event()
        engine = AsyncEngine(fake.engine.config, fake.engine.files, fake.engine.tokenizer, executor)
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        await end(engine)
        executor.started.set()
        with pytest.raises(EngineUnavailableError, match="while it started"):
            await start
        return engine.state, executor._task

    assert asyncio.run(main()) == ("dead", None)


def test_an_unknown_policy_is_told_before_the_model_is_loaded(tmp_path):
    fake = FakeEngine(tmp_path, settings={"scheduling_policy": "lottery"})
    with pytest.raises(ConfigError, match=r"lottery.*known: fcfs, priority"):
        asyncio.run(fake.__aenter__())
    assert fake.executor.num_starts == 0


@pytest.mark.parametrize("num_blocks", [200, 800])
def test_a_restarted_workers_kv_memory_is_what_is_planned_with(tmp_path, num_blocks):
    async def scenario(fake):
        await answer(fake, "x" * 100)
        fake.executor.num_blocks = num_blocks
        fake.executor.die()
        tasks = [asyncio.create_task(answer(fake, chr(97 + i) * 900, request_id=f"r{i}")) for i in range(8)]
        outputs = [await task for task in tasks]
        assert all(output.finish_reason is FinishReason.LENGTH for output in outputs)
        used = {block for plan in fake.executor.plans for new in plan.new_requests for block in new.block_ids}
        return fake.engine.stats().num_blocks, max(used)

    total, highest = run(tmp_path, scenario)
    assert total == num_blocks - 1
    assert highest < num_blocks


def test_prompt_logprobs_come_once_a_position_also_when_the_prompt_is_computed_again(tmp_path):
    params = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=0)
    for failing_step in range(1, 7):  # in each chunk of the prompt, at the first token, and after it

        steps = itertools.count(1)

        def fail_once(plan, steps=steps, failing_step=failing_step):
            if next(steps) == failing_step:
                raise RuntimeError("out of luck")

        options = {"executor_options": {"on_step": fail_once}, "settings": {"max_num_batched_tokens": 64}}
        prompt = "".join(chr(97 + i % 26) for i in range(150))
        output = run(tmp_path, lambda fake, prompt=prompt: answer(fake, prompt, params), **options)
        assert [entry.token_id for entry in output.prompt_logprobs[1:]] == list(prompt.encode()[1:])
        assert len(output.token_ids) == 4


def test_prompt_tokens_are_counted_once_a_request_also_without_an_answer(tmp_path):
    async def scenario(fake):
        async with fake.engine.generate([1] * 50, SamplingParams(n=4, max_tokens=3), request_id="n") as stream:
            [output async for output in stream]
        await answer(fake, "x" * 30, SamplingParams(max_tokens=0), request_id="none")
        return fake.engine.metrics.render().decode()

    text = run(tmp_path, scenario)
    assert "servd_prompt_tokens_total 80.0" in text
    assert "servd_request_queue_seconds_count 5.0" in text


def test_the_request_whose_decode_steps_kill_workers_is_found(tmp_path):
    """Each replay's prefill gives it a token more: progress of a kind, but not past what kills."""

    def poisoned(plan):
        scheduled = plan.scheduled
        for request_id, count in zip(scheduled.request_ids, scheduled.num_scheduled_tokens, strict=True):
            if request_id.startswith("poison") and count == 1:
                raise WorkerDied("killed by poison")

    async def scenario(fake):
        good = [asyncio.create_task(answer(fake, f"g{i}", GREEDY, request_id=f"g{i}")) for i in range(4)]
        bad = asyncio.create_task(answer(fake, "bad", GREEDY, request_id="poison"))
        return [await task for task in good], await bad

    good, bad = run(tmp_path, scenario, executor_options={"on_step": poisoned})
    assert all(output.finish_reason is FinishReason.LENGTH for output in good)
    assert isinstance(bad.error, RequestFailedError)


def test_every_caller_hears_of_a_broken_invariant_and_the_log_says_where(tmp_path, caplog):
    async def main():
        async with FakeEngine(tmp_path, executor_options={"step_delay": 0.002}) as fake:
            params = SamplingParams(max_tokens=1000)
            tasks = [asyncio.create_task(answer(fake, f"p{i}", params)) for i in range(3)]
            await fake.wait_until(lambda: fake.engine.stats().running == 3)
            for block in fake.engine.core.scheduler.cache.pool.blocks:
                block.ref_count = 0  # now every release is a double free
            fake.executor.on_step = lambda plan: 1 / 0  # the replay releases all blocks
            outputs = await asyncio.wait_for(asyncio.gather(*tasks), 5)
            await fake.engine.wait_dead()
            return outputs

    with caplog.at_level(logging.ERROR, "servd.engine"):
        outputs = asyncio.run(main())
    assert [output.finish_reason for output in outputs] == [FinishReason.ERROR] * 3
    assert all(isinstance(output.error, EngineUnavailableError) for output in outputs)
    assert any("double free" in (record.exc_text or "") for record in caplog.records)


def test_a_worker_that_dies_idle_is_replaced_before_anybody_asks(tmp_path):
    async def scenario(fake):
        fake.executor.die()
        await fake.wait_until(lambda: fake.executor.num_starts == 2 and fake.engine.state == "ready")
        output = await answer(fake, "abc", GREEDY)
        return fake.executor.num_starts, output.finish_reason

    assert run(tmp_path, scenario) == (2, FinishReason.LENGTH)


def test_new_workers_get_longer_for_their_first_step_and_old_ones_do_not(tmp_path):
    """A restarted worker compiles and reads weights like the first; one that only failed a step has done so."""
    limit, failures = 1000.0, iter([])

    def fail(plan):
        for failure in failures:
            raise failure

    async def patience(fake):
        """Seconds that a step in flight has now."""
        await fake.wait_until(lambda: fake.engine.core._patience() is not None)
        return fake.engine.core._patience()

    async def scenario(fake):
        nonlocal failures
        fake.executor.gate.clear()
        task = asyncio.create_task(answer(fake, "first"))
        found = [await patience(fake)]
        fake.executor.gate.set()
        await task
        for failure in (RuntimeError("out of luck"), WorkerDied("killed")):
            fake.executor.gate.clear()
            task = asyncio.create_task(answer(fake, "again"))
            found.append(await patience(fake))
            lost = asyncio.Event()
            report = fake.engine.request_log.steps_lost

            def note(*, workers_lost, lost=lost, report=report):
                fake.executor.gate.clear()
                lost.set()
                report(workers_lost=workers_lost)

            fake.engine.request_log.steps_lost = note
            failures = iter([failure])
            fake.executor.gate.set()
            await lost.wait()
            found.append(await patience(fake))
            fake.engine.request_log.steps_lost = report
            fake.executor.gate.set()
            await task
        return found

    settings = {"settings": {"step_timeout": limit}, "executor_options": {"on_step": fail}}
    found = run(tmp_path, scenario, **settings)
    assert [seconds > limit for seconds in found] == [True, False, False, False, True]
