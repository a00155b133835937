"""What is ranked, when, and what becomes of answers that failed."""

import asyncio

from servd.engine.best_of import BestOf
from servd.engine.result_stream import ResultStream
from servd.errors import RequestFailedError
from servd.outputs import RequestOutput, TokenLogprobs
from servd.request import FinishReason
from servd.sampling_params import SamplingParams


def news(index: int, logprob: float, *, ends: bool = True, error: bool = False) -> RequestOutput:
    reason = (FinishReason.ERROR if error else FinishReason.LENGTH) if ends else None
    return RequestOutput(
        "r", index, token_ids=[index], logprobs=[TokenLogprobs(index, logprob, 1, [], [])], finish_reason=reason,
        error=RequestFailedError("no") if error else None,
    )  # fmt: skip


def ranked(outputs: list[RequestOutput], **params) -> list[RequestOutput]:
    stream = ResultStream(2, lambda: None)
    best = BestOf(stream, SamplingParams(n=2, best_of=3, **params))
    for output in outputs:
        best.put(output)

    async def collect() -> list[RequestOutput]:
        return [output async for output in stream]

    return asyncio.run(collect())


def test_the_best_by_mean_come_first_without_logprobs_that_nobody_asked_for():
    found = ranked([news(0, -3.0), news(1, -1.0, ends=False), news(2, -2.5), news(1, -3.0)])
    assert [(output.index, output.token_ids) for output in found] == [(0, [1, 1]), (1, [2])]
    assert [output.logprobs for output in found] == [[], []]
    assert [len(output.logprobs) for output in ranked([news(i, -1.0) for i in range(3)], logprobs=0)] == [1, 1]


def test_an_answer_that_failed_is_taken_only_if_there_is_no_other():
    found = ranked([news(0, -0.1, error=True), news(1, -9.0), news(2, -5.0)])
    assert [output.token_ids for output in found] == [[2], [1]] and not any(output.error for output in found)
    found = ranked([news(0, -0.1, error=True), news(1, -9.0), news(2, -0.1, error=True)])
    assert [output.error is None for output in found] == [True, False]
