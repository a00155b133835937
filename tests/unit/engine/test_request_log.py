"""Why a request was slow: each cause is forced, and named; the seconds of the phases add up to the whole."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from servd.engine import result_stream
from servd.engine.request_log import MAX_FINISHED, RequestLog, UnknownRequestError
from servd.engine.result_stream import ResultStream
from servd.outputs import RequestOutput, ScheduledRequests, SchedulerOutput
from servd.request import FinishReason, Request
from servd.sampling_params import SamplingParams
from tests.fakes import FakeEngine

Scenario = Callable[[FakeEngine], Coroutine[Any, Any, Any]]


def run(folder: Path, scenario: Scenario, *, num_blocks: int = 513, on_step: Any = None, **settings: Any) -> Any:
    async def main() -> Any:
        options = {"num_blocks": num_blocks, "on_step": on_step}
        async with FakeEngine(folder, {"num_speculative_tokens": 0, **settings}, executor_options=options) as fake:
            found = await scenario(fake)
            await fake.wait_idle()
            return found

    return asyncio.run(main())


async def ask(fake: FakeEngine, name: str, prompt: str = "hello", max_tokens: int = 10, **params: Any) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **params)
    async with fake.engine.generate(list(prompt.encode()), sampling, request_id=name) as stream:
        async for output in stream:
            assert output.error is None


def record(fake: FakeEngine, name: str, index: int = 0) -> dict[str, Any]:
    """One answer's record, whose phases must add up."""
    answer: dict[str, Any] = fake.engine.request_log.describe(name)["answers"][index]
    assert math.fsum(answer["seconds"].values()) == pytest.approx(answer["total_seconds"], abs=1e-6)
    assert answer["num_stalls"] == len(answer["stalls"])
    return answer


def stall_of(answer: dict[str, Any], cause: str) -> dict[str, Any]:
    """The longest stall with that cause: on a busy machine there may be others besides."""
    found = [stall for stall in answer["stalls"] if stall["cause"] == cause]
    assert found, f"no stall by {cause}: {answer['stalls']}"
    return max(found, key=lambda stall: float(stall["seconds"]))


async def tokens_of(fake: FakeEngine, name: str, count: int) -> None:
    """Wait until so many tokens of a running request are there."""
    await asyncio.sleep(0)  # the task that asks begins
    await fake.wait_until(lambda: record(fake, name)["output_tokens"] >= count)


def test_an_undisturbed_request_has_a_plain_story(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> dict[str, Any]:
        await ask(fake, "r", "x" * 100, 10)
        return record(fake, "r")

    answer = run(tmp_path, scenario, max_num_batched_tokens=64)
    assert (answer["state"], answer["finish_reason"]) == ("finished", "length")
    assert (answer["prompt_tokens"], answer["cached_tokens"], answer["output_tokens"]) == (100, 0, 10)
    assert set(answer["seconds"]) == {"queued", "prefill", "decode"}
    assert [chunk["tokens"] for chunk in answer["prefill_chunks"]] == [64, 36]
    assert answer["num_steps"] == 11 and answer["batch_size"] == {"min": 1, "mean": 1, "max": 1}
    assert answer["num_preemptions"] == answer["num_worker_deaths"] == answer["accepted_draft_tokens"] == 0
    assert 0 < answer["time_to_first_token_seconds"] < answer["total_seconds"]
    assert 0 < answer["gap_seconds"]["median"] <= answer["gap_seconds"]["max"]


def test_cached_tokens_batch_sizes_and_right_guesses_are_told(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> list[dict[str, Any]]:
        await ask(fake, "first", "x" * 100)
        await asyncio.gather(ask(fake, "again", "x" * 100, 40), ask(fake, "other", "y" * 50, 20))
        return [record(fake, name) for name in ("first", "again", "other")]

    first, again, _ = run(tmp_path, scenario, num_speculative_tokens=3)
    assert (first["cached_tokens"], again["cached_tokens"]) == (0, 96)
    assert again["batch_size"]["min"] == 1 and again["batch_size"]["max"] == 2
    assert again["accepted_draft_tokens"] > 0


def test_a_preempted_request_says_so_and_what_it_waited_for(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> dict[str, Any]:
        fake.executor.step_delay = 0.002
        await asyncio.gather(ask(fake, "first", "a" * 60, 100), ask(fake, "second", "b" * 60, 100))
        assert record(fake, "first")["num_preemptions"] == 0
        return record(fake, "second")

    answer = run(tmp_path, scenario, num_blocks=16)
    assert answer["num_preemptions"] == 1 and answer["preemptions"][0]["reason"] == "blocks"
    stall = stall_of(answer, "preempted")
    assert stall["detail"]["waited_for"]["blocks"] > 0.5 * stall["seconds"]
    assert answer["seconds"]["preempted"] > 0.05 and answer["seconds"]["recompute"] > 0
    assert answer["waited_for"]["blocks"] == pytest.approx(answer["seconds"]["preempted"], rel=0.2)


def test_another_prompts_prefill_is_named(tmp_path: Path) -> None:
    def slow_prefill(plan: Any) -> None:
        if any(count > 100 for count in plan.scheduled.num_scheduled_tokens):
            time.sleep(0.3)

    async def scenario(fake: FakeEngine) -> dict[str, Any]:
        task = asyncio.create_task(ask(fake, "victim", max_tokens=200))
        await tokens_of(fake, "victim", 20)
        await asyncio.gather(task, ask(fake, "long", "z" * 400, 1))
        return record(fake, "victim")

    answer = run(tmp_path, scenario, on_step=slow_prefill)
    stall = stall_of(answer, "prefill_of_others")
    assert stall["detail"]["prefill_tokens"] == 400 and stall["seconds"] >= 0.3


def test_a_killed_worker_is_named_and_its_restart_is_counted(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> list[dict[str, Any]]:
        task = asyncio.create_task(ask(fake, "r", max_tokens=100))
        await tokens_of(fake, "r", 10)
        fake.executor.gate.clear()
        fake.executor.die()
        waiting = asyncio.create_task(ask(fake, "came later", "q" * 20))
        await asyncio.sleep(0.3)
        fake.executor.gate.set()
        await asyncio.gather(task, waiting)
        return [record(fake, "r"), record(fake, "came later")]

    answer, _ = run(tmp_path, scenario)
    assert stall_of(answer, "worker_restarted")["seconds"] >= 0.3
    assert (answer["num_worker_deaths"], answer["num_preemptions"]) == (1, 0)
    assert {"recovering", "recompute"} <= set(answer["seconds"])


def test_a_request_that_waits_for_a_restart_says_so(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> dict[str, Any]:
        start = fake.executor.start

        async def slow_start(progress: Any = None) -> Any:
            await asyncio.sleep(0.3)
            return await start(progress)

        fake.executor.start = slow_start  # type: ignore[method-assign]
        fake.executor.die()
        await fake.wait_until(lambda: fake.engine.state == "recovering")
        await ask(fake, "r")
        return record(fake, "r")

    answer = run(tmp_path, scenario)
    assert stall_of(answer, "worker_restart")["at_seconds"] == 0
    assert answer["waited_for"]["worker_restart"] > 0.2


def test_a_step_that_failed_is_named(tmp_path: Path) -> None:
    events = iter(["fail", "", "slow"])

    def fail_once(plan: Any) -> None:
        event = next(events, "") if plan.step_id > 10 else ""
        if event == "fail":
            raise RuntimeError("out of memory")
        if event == "slow":
            time.sleep(0.3)

    async def scenario(fake: FakeEngine) -> dict[str, Any]:
        await ask(fake, "r", max_tokens=40)
        return record(fake, "r")

    answer = run(tmp_path, scenario, on_step=fail_once)
    assert stall_of(answer, "step_failed")["seconds"] >= 0.3 and answer["num_worker_deaths"] == 0


def test_a_step_that_computes_long_is_told_from_a_busy_front(tmp_path: Path) -> None:
    blocked = iter([False] * 30 + [True])

    def block_loop(_: Any) -> None:
        if next(blocked, False):
            time.sleep(0.3)

    async def scenario(fake: FakeEngine) -> dict[str, Any]:
        task = asyncio.create_task(ask(fake, "r", max_tokens=300))
        await tokens_of(fake, "r", 60)
        fake.executor.step_delay = 0.4
        await fake.wait_until(lambda: record(fake, "r")["gap_seconds"]["max"] > 0.39)
        fake.executor.step_delay = 0.0
        await task
        return record(fake, "r")

    answer = run(tmp_path, scenario, on_step=block_loop)
    busy, slow = stall_of(answer, "front_busy"), stall_of(answer, "slow_step")
    assert busy["seconds"] >= 0.3 and busy["detail"]["compute_seconds"] == 0
    assert slow["detail"]["compute_seconds"] == 0.4


def test_a_client_that_does_not_read_is_named(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> dict[str, Any]:
        params = SamplingParams(max_tokens=200, temperature=0.0)
        async with fake.engine.generate([1, 2, 3], params, request_id="r") as stream:
            await anext(stream)
            await asyncio.sleep(0.3)
            assert record(fake, "r")["unread_seconds"] > 0.2  # and counting
            async for _ in stream:
                pass
        return record(fake, "r")

    answer = run(tmp_path, scenario)
    assert stall_of(answer, "client_not_reading")["seconds"] > 0.2
    assert answer["unread_seconds"] > 0.2


@pytest.mark.parametrize(
    ("cause", "settings", "num_blocks"),
    [
        ("seats", {"max_num_seqs": 1}, 513),
        ("blocks", {}, 20),
        ("token_budget", {"max_num_batched_tokens": 64, "max_num_seqs": 8, "enable_prefix_caching": False}, 513),
    ],
)
def test_what_a_queued_request_waits_for_is_named(
    tmp_path: Path, cause: str, settings: dict[str, Any], num_blocks: int
) -> None:
    async def scenario(fake: FakeEngine) -> dict[str, Any]:
        fake.executor.step_delay = 0.005
        before = asyncio.create_task(ask(fake, "before", "b" * (2000 if cause == "token_budget" else 200), 40))
        await fake.wait_until(lambda: fake.engine.stats().running == 1)
        waiting = asyncio.create_task(ask(fake, "r", "r" * 150, 2))
        await asyncio.sleep(0.1)
        now = record(fake, "r")
        assert now["state"] == "waiting" and max(now["waited_for"], key=now["waited_for"].get) == cause
        await asyncio.gather(before, waiting)
        return record(fake, "r")

    answer = run(tmp_path, scenario, num_blocks=num_blocks, **settings)
    assert stall_of(answer, cause)["at_seconds"] == 0
    assert math.fsum(answer["waited_for"].values()) == pytest.approx(answer["seconds"]["queued"], abs=0.02)


def test_later_answers_wait_for_the_prompt_they_share(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> list[dict[str, Any]]:
        fake.executor.step_delay = 0.02
        await ask(fake, "r", "x" * 300, 3, n=2)
        return [record(fake, "r", index) for index in (0, 1)]

    first, second = run(tmp_path, scenario, max_num_batched_tokens=64)
    assert "first_answer" not in first["waited_for"]
    assert stall_of(second, "first_answer")["at_seconds"] == 0
    assert second["waited_for"] == {"first_answer": pytest.approx(second["seconds"]["queued"])}


def test_a_beam_search_counts_its_steps_and_its_answers_are_not_in_the_queue(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> list[dict[str, Any]]:
        await ask(fake, "r", "x" * 40, 6, n=2, use_beam_search=True)
        return [record(fake, "r", index) for index in (0, 1)]

    for answer in run(tmp_path, scenario):
        assert set(answer["seconds"]) == {"queued", "search"} and answer["seconds"]["search"] > 0
        assert answer["num_steps"] >= 6 and answer["batch_size"]["max"] >= 2
        assert (answer["state"], answer["output_tokens"]) == ("finished", None)


def test_a_prompt_only_request_and_an_aborted_one_end(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> list[dict[str, Any]]:
        await ask(fake, "prompt", "x" * 40, 0)
        stream = fake.engine.generate([1], SamplingParams(max_tokens=100), request_id="aborted")
        await anext(stream)
        await stream.aclose()
        return [record(fake, "prompt"), record(fake, "aborted")]

    prompt, aborted = run(tmp_path, scenario)
    assert (prompt["finish_reason"], prompt["output_tokens"]) == ("length", 0)
    assert prompt["time_to_first_token_seconds"] is None
    assert (aborted["state"], aborted["finish_reason"]) == ("finished", "abort")


# -- the log's own bookkeeping -----------------------------------------------------------------------------------------


def add(log: RequestLog, name: str, n: int = 1) -> None:
    params = SamplingParams(n=n)
    log.begin(name, [Request(f"{name}#{i}", [1], params, max_model_len=9) for i in range(n)], lambda _: None)


def end(log: RequestLog, name: str, n: int = 1) -> None:
    for i in range(n):
        log.finish(f"{name}#{i}", FinishReason.STOP)


def test_only_the_last_finished_ones_are_kept_and_all_that_run() -> None:
    log = RequestLog()
    add(log, "runs")
    for i in range(MAX_FINISHED + 50):
        add(log, f"r{i}")
        end(log, f"r{i}")
    assert log.describe("runs")["state"] == "waiting"
    assert log.describe("r50")["state"] == "finished"
    with pytest.raises(UnknownRequestError):
        log.describe("r49")
    add(log, "wide", 128)
    end(log, "wide", 128)
    with pytest.raises(UnknownRequestError):
        log.describe("r177")
    assert log.describe("r178")["state"] == "finished"
    assert len(log.overview(limit=5000)) == len(log._calls) == MAX_FINISHED - 128 + 2 == len(log._by_name)


def test_a_request_is_found_by_each_of_its_names_and_by_its_tenant_alone() -> None:
    log = RequestLog()
    for i in range(3):
        add(log, f"cmpl-a-{i}")
        log.claim(f"cmpl-a-{i}", tenant="one", alias="from the client")
    for name, count in (("cmpl-a", 3), ("cmpl-a-1", 1), ("from the client", 3)):
        assert [a["prompt"] for a in log.describe(name, "one")["answers"]] == list(range(count))
        for tenant in ("", "two"):
            with pytest.raises(UnknownRequestError):
                log.describe(name, tenant)
    assert [entry["id"] for entry in log.overview("one", limit=2)] == ["cmpl-a-2", "cmpl-a-1"]
    assert log.overview("two") == log.overview() == []


def test_an_id_that_is_used_again_names_the_newer_request() -> None:
    log = RequestLog()
    for _ in range(2):
        add(log, "r")
        end(log, "r")
    add(log, "r")
    for i in range(MAX_FINISHED + 5):
        add(log, f"other{i}")
        end(log, f"other{i}")
    assert log.describe("r")["state"] == "waiting"


def test_what_nobody_will_fetch_is_not_counted_as_unread(tmp_path: Path) -> None:
    async def scenario(fake: FakeEngine) -> None:
        stream = fake.engine.generate(list(b"hello"), SamplingParams(max_tokens=400, prompt_logprobs=5), request_id="r")
        await stream.aclose()  # before the first step; the answer's last words come after
        await asyncio.sleep(0.05)
        first = record(fake, "r")
        await asyncio.sleep(0.05)
        assert first["finish_reason"] == "abort"
        assert record(fake, "r") == first

    run(tmp_path, scenario)


def test_steps_without_a_result_are_not_remembered() -> None:
    log = RequestLog()
    for step_id in range(2):
        plan = SchedulerOutput(step_id, [], ScheduledRequests([], [], [], [], []), [], [], [])
        log.planned(plan, "next_step")
    log.steps_lost(workers_lost=False)
    assert not log._submitted


def test_what_was_unread_when_a_stream_is_closed_is_told_and_no_longer_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> list[tuple[int, float, float]]:
        told: list[tuple[int, float, float]] = []
        stream = ResultStream(2, lambda: None)
        stream.on_unread = lambda *unread: told.append(unread)
        for index, now in enumerate((10.0, 12.5)):
            monkeypatch.setattr(result_stream.time, "monotonic", lambda now=now: now)
            stream.put(RequestOutput("r", index, text="x"))
        await stream.aclose()
        assert stream.unread_since(0) is None and stream.unread_since(1) is None
        return told

    assert asyncio.run(main()) == [(0, 10.0, 2.5)]
