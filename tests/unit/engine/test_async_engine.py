"""The engine's behaviour over a fake worker: answers, endings, limits, aborts, recovery, shutdown."""

import asyncio

import pytest

from servd.errors import (
    ConfigError,
    DeadlineExceededError,
    EngineUnavailableError,
    OverloadedError,
    RequestFailedError,
    WorkerDied,
)
from servd.outputs import RequestOutput
from servd.request import FinishReason
from servd.sampling_params import SamplingParams
from tests.fakes import EOS, FakeEngine

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


def run(folder, scenario, **options):
    async def main():
        async with FakeEngine(folder, **options) as fake:
            result = await asyncio.wait_for(scenario(fake), 30)
            await fake.wait_idle()
            return result

    return asyncio.run(main())


async def answer(fake, prompt: str, params: SamplingParams = GREEDY, **kwargs) -> RequestOutput:
    """All news of a one-answer request, merged."""
    kwargs.setdefault("request_id", f"r-{prompt}-{id(params)}")
    whole = None
    async with fake.engine.generate(list(prompt.encode()), params, **kwargs) as stream:
        async for output in stream:
            if whole is None:
                whole = output
            else:
                whole.merge(output)
    return whole


def test_an_answer_comes_in_pieces_and_ends_with_a_reason(tmp_path):
    async def scenario(fake):
        pieces = []
        async with fake.engine.generate(list(b"hi"), GREEDY, request_id="r") as stream:
            async for output in stream:
                pieces.append(output)
        return pieces

    pieces = run(tmp_path, scenario, executor_options={"replies": {"hi": "hello world"}})
    assert "".join(piece.text for piece in pieces) == "hello world"
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason is FinishReason.STOP
    assert pieces[-1].num_output_tokens == len("hello world") + 1  # the end-of-text token counts


def test_a_slow_reader_gets_merged_news(tmp_path):
    async def scenario(fake):
        async with fake.engine.generate(list(b"hi"), GREEDY, request_id="r") as stream:
            await fake.wait_until(lambda: fake.engine.stats().running == 0 and fake.executor.plans)
            return [output async for output in stream]

    (only,) = run(tmp_path, scenario, executor_options={"replies": {"hi": "hello"}})
    assert (only.text, only.token_ids) == ("hello", [*b"hello", EOS])


def test_max_tokens_ends_with_length(tmp_path):
    output = run(tmp_path, lambda fake: answer(fake, "abc", SamplingParams(max_tokens=7, temperature=0.0)))
    assert output.finish_reason is FinishReason.LENGTH
    assert len(output.token_ids) == len(output.text) == 7


def test_a_stop_string_across_tokens_ends_the_answer_and_never_shows(tmp_path):
    params = SamplingParams(max_tokens=50, stop=("lo w",))
    options = {"replies": {"hi": "hello world, on and on"}}
    output = run(tmp_path, lambda fake: answer(fake, "hi", params), executor_options=options)
    assert (output.text, output.finish_reason, output.stop_reason) == ("hel", FinishReason.STOP, "lo w")


def test_text_held_back_for_a_stop_string_is_not_lost_at_the_end(tmp_path):
    params = SamplingParams(max_tokens=5, stop=("lo world",))
    output = run(tmp_path, lambda fake: answer(fake, "hi", params), executor_options={"replies": {"hi": "hello w"}})
    assert (output.text, output.finish_reason) == ("hello", FinishReason.LENGTH)


def test_a_stop_token_is_told_and_left_out_of_the_text(tmp_path):
    params = SamplingParams(max_tokens=50, stop_token_ids=(ord("o"),))
    output = run(tmp_path, lambda fake: answer(fake, "hi", params), executor_options={"replies": {"hi": "hello"}})
    assert (output.text, output.stop_reason, output.token_ids) == ("hell", ord("o"), list(b"hello"))


def test_half_a_character_is_never_sent(tmp_path):
    async def scenario(fake):
        async with fake.engine.generate(list(b"hi"), GREEDY, request_id="r") as stream:
            return [output.text async for output in stream]

    texts = run(tmp_path, scenario, executor_options={"replies": {"hi": "né 😀"}})
    assert "".join(texts) == "né 😀"
    assert not any("\ufffd" in text for text in texts)


def test_n_answers_share_the_prompt_and_differ_by_seed(tmp_path):
    async def scenario(fake):
        params = SamplingParams(n=3, max_tokens=12, seed=5)
        texts = {0: "", 1: "", 2: ""}
        async with fake.engine.generate(list(b"tell me"), params, request_id="r") as stream:
            async for output in stream:
                texts[output.index] += output.text
        return texts, await answer(fake, "tell me", SamplingParams(max_tokens=12, seed=5))

    texts, alone = run(tmp_path, scenario)
    assert len(set(texts.values())) == 3
    assert texts[0] == alone.text  # the first answer is the one that n=1 gives


def test_a_short_request_overtakes_a_long_one(tmp_path):
    async def scenario(fake):
        order = []

        async def one(prompt, max_tokens):
            await answer(fake, prompt, SamplingParams(max_tokens=max_tokens))
            order.append(prompt)

        long = asyncio.create_task(one("long", 300))
        await fake.wait_until(lambda: fake.engine.stats().running == 1)
        await one("short", 3)
        await long
        return order

    assert run(tmp_path, scenario) == ["short", "long"]


def test_closing_the_stream_frees_the_blocks_at_once(tmp_path):
    async def scenario(fake):
        stream = fake.engine.generate(list(b"abc" * 20), SamplingParams(max_tokens=500), request_id="r")
        await anext(stream)
        assert fake.engine.stats().kv_blocks_used > 0
        await stream.aclose()
        return fake.engine.stats().kv_blocks_used

    assert run(tmp_path, scenario) == 0


def test_a_cancelled_consumer_frees_its_request(tmp_path):
    async def scenario(fake):
        task = asyncio.create_task(answer(fake, "abc", SamplingParams(max_tokens=500)))
        await fake.wait_until(lambda: fake.engine.stats().running == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return fake.engine.stats()

    stats = run(tmp_path, scenario)
    assert (stats.running, stats.kv_blocks_used) == (0, 0)


def test_abort_ends_the_stream_with_its_reason_and_is_idempotent(tmp_path):
    async def scenario(fake):
        stream = fake.engine.generate(list(b"abc"), SamplingParams(max_tokens=500), request_id="r")
        await anext(stream)
        assert fake.engine.abort("r") is True
        assert fake.engine.abort("r") is False
        assert fake.engine.abort("never there") is False
        return [output async for output in stream][-1]

    assert run(tmp_path, scenario).finish_reason is FinishReason.ABORT


def test_two_hundred_cancellations_leave_nothing_behind(tmp_path):
    async def scenario(fake):
        async def start_and_leave(i):
            prompt = list(b"abc" * (i % 30 + 1))
            stream = fake.engine.generate(prompt, SamplingParams(max_tokens=500), request_id=f"r{i}")
            for _ in range(i % 4):
                await anext(stream)
            await stream.aclose()

        await asyncio.gather(*(start_and_leave(i) for i in range(200)))
        return fake.engine.stats()

    stats = run(tmp_path, scenario)
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


def test_a_deadline_ends_the_request_with_an_error_of_its_own(tmp_path):
    async def scenario(fake):
        return await answer(fake, "abc", SamplingParams(max_tokens=1000), timeout=0.1)

    output = run(tmp_path, scenario, executor_options={"step_delay": 0.01})
    assert output.finish_reason is FinishReason.DEADLINE
    assert isinstance(output.error, DeadlineExceededError)
    assert 0 < output.num_output_tokens < 1000


def test_a_finished_requests_deadline_does_not_hit_its_successor(tmp_path):
    async def scenario(fake):
        await answer(fake, "abc", SamplingParams(max_tokens=2), request_id="r", timeout=0.1)
        return await answer(fake, "abc", SamplingParams(max_tokens=40), request_id="r")

    output = run(tmp_path, scenario, executor_options={"step_delay": 0.005})
    assert output.finish_reason is FinishReason.LENGTH


def test_a_full_queue_refuses_before_any_work(tmp_path):
    async def scenario(fake):
        fake.executor.gate.clear()
        streams = [fake.engine.generate([1], GREEDY, request_id=f"r{i}") for i in range(3)]
        with pytest.raises(OverloadedError):
            fake.engine.generate([1], GREEDY, request_id="one too many")
        fake.executor.gate.set()
        for stream in streams:
            await stream.aclose()

    run(tmp_path, scenario, settings={"max_num_queued_reqs": 3})


def test_a_dead_worker_loses_nothing(tmp_path):
    async def scenario(fake):
        expected = [(await answer(fake, f"p{i}", SamplingParams(max_tokens=60, seed=i))).text for i in range(5)]
        tasks = [asyncio.create_task(answer(fake, f"p{i}", SamplingParams(max_tokens=60, seed=i))) for i in range(5)]
        await fake.wait_until(lambda: fake.engine.stats().running == 5)
        fake.executor.die()
        return expected, [(await task).text for task in tasks], fake.executor.num_starts

    expected, got, num_starts = run(tmp_path, scenario, executor_options={"step_delay": 0.002})
    assert got == expected
    assert num_starts == 2


def test_a_step_that_fails_is_replayed_on_the_same_worker(tmp_path):
    failures = iter([True])

    def fail_once(plan):
        if plan.step_id == 6 and next(failures, False):
            raise RuntimeError("out of luck")

    async def scenario(fake):
        first = (await answer(fake, "abc", SamplingParams(max_tokens=5, temperature=0.0))).text
        tasks = [asyncio.create_task(answer(fake, "abc", GREEDY, request_id=f"r{i}")) for i in range(3)]
        return first, [(await task).text for task in tasks], fake.executor.num_starts

    first, texts, num_starts = run(tmp_path, scenario, executor_options={"on_step": fail_once})
    assert len(set(texts)) == 1 and texts[0].startswith(first) and len(texts[0]) == 20
    assert num_starts == 1


def test_the_request_that_kills_workers_is_failed_alone(tmp_path):
    def poisoned(plan):
        if any(request_id.startswith("poison") for request_id in plan.scheduled.request_ids):
            raise WorkerDied("killed by poison")

    async def scenario(fake):
        good = [asyncio.create_task(answer(fake, f"g{i}", GREEDY, request_id=f"g{i}")) for i in range(4)]
        bad = asyncio.create_task(answer(fake, "bad", GREEDY, request_id="poison"))
        return [await task for task in good], await bad

    good, bad = run(tmp_path, scenario, executor_options={"on_step": poisoned}, settings={"max_worker_restarts": 5})
    assert all(output.finish_reason is FinishReason.LENGTH for output in good)
    assert bad.finish_reason is FinishReason.ERROR
    assert isinstance(bad.error, RequestFailedError)


def test_workers_that_keep_dying_end_every_request_with_an_error(tmp_path):
    def always(plan):
        raise WorkerDied("no luck")

    async def scenario(fake):
        output = await answer(fake, "abc", GREEDY)
        assert fake.engine.state == "dead"
        await fake.engine.wait_dead()
        with pytest.raises(EngineUnavailableError):
            fake.engine.generate([1], GREEDY, request_id="later")
        return output

    output = run(tmp_path, scenario, executor_options={"on_step": always}, settings={"max_worker_restarts": 1})
    assert output.finish_reason is FinishReason.ERROR
    assert isinstance(output.error, WorkerDied)


def test_draining_finishes_what_runs_and_takes_nothing_new(tmp_path):
    async def scenario(fake):
        task = asyncio.create_task(answer(fake, "abc", SamplingParams(max_tokens=30)))
        await fake.wait_until(lambda: fake.engine.stats().running == 1)
        draining = asyncio.create_task(fake.engine.drain(20))
        await fake.wait_until(lambda: fake.engine.state == "draining")
        with pytest.raises(EngineUnavailableError, match="draining"):
            fake.engine.generate([1], GREEDY, request_id="late")
        await draining
        return await task

    assert run(tmp_path, scenario, executor_options={"step_delay": 0.002}).finish_reason is FinishReason.LENGTH


def test_draining_past_its_time_ends_the_rest_with_an_error(tmp_path):
    async def scenario(fake):
        task = asyncio.create_task(answer(fake, "abc", SamplingParams(max_tokens=2000)))
        await fake.wait_until(lambda: fake.engine.stats().running == 1)
        await fake.engine.drain(0.05)
        return await task

    output = run(tmp_path, scenario, executor_options={"step_delay": 0.002})
    assert output.finish_reason is FinishReason.ABORT
    assert isinstance(output.error, EngineUnavailableError)


def test_logprobs_come_one_a_token_and_prompt_logprobs_once(tmp_path):
    params = SamplingParams(max_tokens=3, temperature=0.0, logprobs=2, prompt_logprobs=1)
    output = run(tmp_path, lambda fake: answer(fake, "abcd", params))
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert output.prompt_logprobs[0] is None
    assert [entry.token_id for entry in output.prompt_logprobs[1:]] == list(b"bcd")


def test_prompt_logprobs_alone_need_no_token(tmp_path):
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    output = run(tmp_path, lambda fake: answer(fake, "abcd", params))
    assert (output.token_ids, output.finish_reason) == ([], FinishReason.LENGTH)
    assert len(output.prompt_logprobs) == 4


def test_min_tokens_hold_back_stop_strings_too(tmp_path):
    params = SamplingParams(max_tokens=8, min_tokens=5, stop=("l",))
    output = run(tmp_path, lambda fake: answer(fake, "hi", params), executor_options={"replies": {"hi": "hello lol"}})
    assert output.text == "hello "


def test_metrics_tell_what_happened(tmp_path):
    async def scenario(fake):
        await answer(fake, "x" * 100, GREEDY, request_id="a")
        await answer(fake, "x" * 100, GREEDY, request_id="b")
        return fake.engine.metrics.render().decode()

    text = run(tmp_path, scenario)
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['servd_requests_finished_total{reason="length"}'] == "2.0"
    assert lines["servd_generation_tokens_total"] == "40.0"
    assert lines["servd_prompt_tokens_total"] == "200.0"
    assert lines["servd_prefix_cache_hits_total"] == "96.0"
    assert lines['servd_kv_blocks{state="used"}'] == "0.0"
    assert lines["servd_time_to_first_token_seconds_count"] == "2.0"
    assert lines["servd_inter_token_latency_seconds_count"] == "38.0"


def test_the_step_log_shows_chunks_and_answers_in_one_step(tmp_path):
    async def scenario(fake):
        params = SamplingParams(max_tokens=60)
        await asyncio.gather(answer(fake, "abc", params), answer(fake, "y" * 400, GREEDY))
        return list(fake.engine.core.step_log)

    records = run(tmp_path, scenario, settings={"max_num_batched_tokens": 64})
    assert any(record.num_prefill_tokens > 1 and record.num_decode_tokens == 1 for record in records)


def test_a_context_longer_than_the_models_is_refused_at_start(tmp_path):
    with pytest.raises(ConfigError, match="--max-model-len"):
        run(tmp_path, lambda fake: asyncio.sleep(0), settings={"max_model_len": 4096})


def test_every_one_of_n_answers_has_the_prompts_logprobs(tmp_path):
    async def scenario(fake):
        found = {}
        params = SamplingParams(n=3, max_tokens=2, prompt_logprobs=0)
        async with fake.engine.generate(list(b"abcd"), params, request_id="r") as stream:
            async for output in stream:
                if output.prompt_logprobs is not None:
                    found[output.index] = len(output.prompt_logprobs)
        return found

    assert run(tmp_path, scenario) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize("generation_config, expected", [("auto", {"temperature": 0.3, "top_k": 40}), ("none", {})])
def test_sampling_defaults_are_the_models_unless_turned_off(tmp_path, generation_config, expected):
    text = '{"temperature": 0.3, "top_k": 40, "top_p": null, "max_length": 9}'
    (tmp_path / "generation_config.json").write_text(text)

    async def scenario(fake):
        return fake.engine.sampling_defaults

    assert run(tmp_path, scenario, settings={"generation_config": generation_config}) == expected


def test_sampling_defaults_out_of_range_are_refused_at_start(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(ConfigError, match="generation_config.json.*top_p"):
        run(tmp_path, lambda fake: asyncio.sleep(0))
