"""One call's answers: started together, gathered or merged as they come, and aborted together.

Knows nothing of JSON or SSE; answers are numbered prompt * n + index.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from servd.api.http.context import ARRIVAL, SERVICE
from servd.api.http.schema import GenerationRequest
from servd.engine.result_stream import ResultStream
from servd.errors import DeadlineExceededError
from servd.outputs import RequestOutput, TokenLogprobs
from servd.request import FinishReason
from servd.sampling_params import SamplingParams

Batch = list[tuple[int, RequestOutput]]  # (answer, its news), at most one an answer
_News = asyncio.Queue[tuple[int, RequestOutput] | Exception | None]  # None: a stream has ended

MAX_QUEUED_OUTPUTS = 64  # what waits here for a slow client; beyond it the engine merges


@dataclass(slots=True)
class Usage:
    """Tokens of the whole call; a prompt counts once however many answers it has."""

    num_answers_per_prompt: int
    _prompt_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    _cached_tokens: dict[int, int] = field(default_factory=dict)
    _output_tokens: dict[int, int] = field(default_factory=dict)  # by answer

    def count(self, answer: int, output: RequestOutput) -> None:
        """Take in an output's totals."""
        prompt, index = divmod(answer, self.num_answers_per_prompt)
        self._output_tokens[answer] = output.num_output_tokens
        self._prompt_tokens[prompt] = output.num_prompt_tokens
        if index == 0:  # the others fork from the first: what they share was not in the cache before
            self._cached_tokens[prompt] = output.num_cached_tokens

    def as_dict(self) -> dict[str, object]:
        """In OpenAI's shape."""
        prompt_tokens, completion_tokens = sum(self._prompt_tokens.values()), sum(self._output_tokens.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }


@dataclass(slots=True)
class Answer:
    """One complete answer. Texts are joined once: adding them up one by one is quadratic."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, output: RequestOutput) -> None:
        """Take in the next news."""
        self.texts.append(output.text)
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        if self.prompt_logprobs is None:
            self.prompt_logprobs = output.prompt_logprobs
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason


def time_left(request: web.Request, deadline_ms: int | None, field: str) -> float | None:
    """Seconds until the deadline, counted from arrival. Raises DeadlineExceededError if it passed over `field`."""
    if deadline_ms is None:
        return None
    seconds = request[ARRIVAL] + deadline_ms / 1000 - time.monotonic()
    if seconds <= 0:
        raise DeadlineExceededError(f"deadline_ms of {deadline_ms} passed before the {field} was read")
    return seconds


async def start_streams(
    request: web.Request,
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    request_id: str,
    prompt_params: Sequence[str],
) -> list[ResultStream]:
    """Queue a request for each prompt: all of them or, if one is refused, none. Raises what the service raises."""
    service = request.app[SERVICE]
    timeout = time_left(request, body.deadline_ms, "prompt")
    if len(prompts) > 1:  # hundreds of prompts are checked one by one: let others run between
        for token_ids, name in zip(prompts, prompt_params, strict=True):
            service.engine.inputs.check(len(token_ids), params, prompt_param=name)
            await asyncio.sleep(0)
    streams: list[ResultStream] = []
    try:
        for i, token_ids in enumerate(prompts):
            stream = service.generate(
                token_ids, params, request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
                priority=body.priority, timeout=timeout, cache_salt=body.cache_salt or "",
                prompt_param=prompt_params[i],
            )  # fmt: skip
            streams.append(stream)
            if len(prompts) > 1:
                await asyncio.sleep(0)
    except BaseException:
        await close_streams(streams)
        raise
    return streams


async def close_streams(streams: Sequence[ResultStream]) -> None:
    """Abort whatever is unfinished."""
    for stream in streams:
        await stream.aclose()


async def gather_answers(streams: Sequence[ResultStream], n: int) -> tuple[list[Answer], Usage]:
    """All answers, complete. Raises the first failure, after aborting the others; closes the streams."""
    answers = [Answer() for _ in range(len(streams) * n)]
    usage = Usage(n)
    batches = merge_batches(streams, n)
    try:
        async for batch in batches:
            for answer, output in batch:
                if output.error is not None:
                    raise output.error
                answers[answer].add(output)
                usage.count(answer, output)
    finally:
        # First, and without a pause: the handler may be cancelled at its next one, while it is already on its way out.
        await close_streams(streams)
        await batches.aclose()
    return answers, usage


async def merge_batches(streams: Sequence[ResultStream], n: int) -> AsyncGenerator[Batch, None]:
    """All news of all streams that is ready at each wake-up. The caller closes the streams."""
    if len(streams) == 1 and n == 1:
        async for output in streams[0]:
            yield [(0, output)]
        return
    queue: _News = asyncio.Queue(MAX_QUEUED_OUTPUTS)
    pumps = [asyncio.create_task(_pump(i * n, stream, queue)) for i, stream in enumerate(streams)]
    unfinished = len(pumps)
    try:
        while unfinished:
            batch: dict[int, RequestOutput] = {}
            item = await queue.get()
            while True:
                if item is None:
                    unfinished -= 1
                elif isinstance(item, Exception):
                    raise item
                elif item[0] in batch:
                    batch[item[0]].merge(item[1])
                else:
                    batch[item[0]] = item[1]
                if queue.empty():
                    break
                item = queue.get_nowait()
            if batch:
                yield list(batch.items())
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(first_answer: int, stream: ResultStream, queue: _News) -> None:
    try:
        async for output in stream:
            await queue.put((first_answer + output.index, output))
        await queue.put(None)
    except Exception as error:  # the reader waits for the queue alone: it must hear of it there
        await queue.put(error)
