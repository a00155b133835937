"""The only per-token loop: detokenize, look for stop strings, hand news to each request's stream, count.

Knows nothing of blocks, steps or transports.
"""

from __future__ import annotations

import time

from servd.engine.detokenizer import Detokenizer, StopStrings
from servd.engine.result_stream import Sink
from servd.engine.tokenizer import Tokenizer
from servd.errors import RequestFailedError, ServdError
from servd.metrics import Metrics
from servd.outputs import RequestOutput, TokenLogprobs
from servd.request import FinishReason, Request
from servd.scheduler.plan import Update


class _AnswerState:
    """One answer's text so far and where its news goes."""

    __slots__ = ("detokenizer", "index", "last_token_time", "num_output_tokens", "prompt_logprobs", "request",
                 "stops", "stream")  # fmt: skip

    def __init__(self, request: Request, index: int, stream: Sink, tokenizer: Tokenizer) -> None:
        params = request.sampling_params
        self.request = request
        self.index = index
        self.stream = stream
        self.detokenizer = Detokenizer(
            tokenizer,
            params.skip_special_tokens,
            continues_text=True,
            shown_special_token_ids=params.shown_special_token_ids,
        )
        self.stops = StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None
        self.num_output_tokens = 0
        self.last_token_time: float | None = None
        # Position 0 has no predecessor to predict it.
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]

    def new_text(self, token_ids: list[int], finished: bool) -> tuple[str, str | None]:
        """Text that became final with these tokens, and the stop string that ended it, if one did."""
        text = self.detokenizer.push(token_ids) + (self.detokenizer.flush() if finished else "")
        if self.stops is None or self.num_output_tokens < self.request.sampling_params.min_tokens:
            return text, None
        text, matched = self.stops.push(text)
        if finished and matched is None:
            text += self.stops.flush()
        return text, matched


class OutputProcessor:
    """The answers being written, by request id."""

    def __init__(self, tokenizer: Tokenizer, metrics: Metrics) -> None:
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._answers: dict[str, _AnswerState] = {}

    def add(self, request: Request, index: int, stream: Sink) -> None:
        """Register an answer before its request is scheduled."""
        self._answers[request.request_id] = _AnswerState(request, index, stream, self._tokenizer)

    def process(self, updates: list[Update]) -> list[str]:
        """Turn a step's updates into news; returns the ids of requests that a stop string ended."""
        now = time.monotonic()
        stopped = []
        for update in updates:
            answer = self._answers.get(update.request.request_id)
            if answer is None:
                continue  # ended by a stop string while this step was in flight
            output = self._output(answer, update)
            if output.token_ids:
                self._count_tokens(answer, len(output.token_ids), now)
            if output.finish_reason is not None:
                if update.finish_reason is None:
                    stopped.append(update.request.request_id)
                self._end(answer, output, now)
            if output.token_ids or output.finish_reason is not None:
                answer.stream.put(output)
        return stopped

    def finish(self, request_id: str, reason: FinishReason, error: ServdError) -> None:
        """End an answer from outside (abort, deadline, shutdown), with the text that was held back."""
        answer = self._answers.get(request_id)
        if answer is not None:
            output = self._output(answer, Update(answer.request, finish_reason=reason))
            output.error = error
            self._end(answer, output, time.monotonic())
            answer.stream.put(output)

    def _output(self, answer: _AnswerState, update: Update) -> RequestOutput:
        request = update.request
        output = RequestOutput(request.request_id, answer.index, num_prompt_tokens=request.num_prompt_tokens)
        output.num_cached_tokens = request.num_cached_tokens
        output.finish_reason = update.finish_reason
        output.embedding = update.embedding
        if update.prompt_logprobs and not answer.num_output_tokens:
            # After a preemption the same positions come again. Position p foretells token p + 1.
            answer.prompt_logprobs[update.first_position + 1 :] = update.prompt_logprobs
        if update.error is not None:
            output.error = RequestFailedError(f"the request could not be computed: {update.error}")
        output.stop_reason = update.stop_token_id if update.stop_token_id not in request.eos_token_ids else None
        self._push_tokens(answer, update, output)
        output.num_output_tokens = answer.num_output_tokens
        if request.sampling_params.prompt_logprobs is not None and answer.num_output_tokens == len(output.token_ids):
            output.prompt_logprobs = answer.prompt_logprobs
        return output

    def _push_tokens(self, answer: _AnswerState, update: Update, output: RequestOutput) -> None:
        """Add the new tokens and their text to `output`, up to the token that completes a stop string."""
        token_ids = update.new_token_ids
        pieces = [token_ids] if answer.stops is None or not token_ids else [[token_id] for token_id in token_ids]
        for i, piece in enumerate(pieces):
            is_last = i + 1 == len(pieces)
            answer.num_output_tokens += len(piece)
            output.token_ids += piece
            visible = piece
            if is_last and update.stop_token_id is not None:
                if not answer.request.sampling_params.include_stop_str_in_output:
                    visible = piece[:-1]  # the token that ended the answer is not part of its text
            text, matched = answer.new_text(visible, is_last and update.finish_reason is not None)
            output.text += text
            if matched is not None:
                output.finish_reason, output.stop_reason = FinishReason.STOP, matched
                break
        output.logprobs = update.logprobs[: len(output.token_ids)]

    def _count_tokens(self, answer: _AnswerState, count: int, now: float) -> None:
        metrics = self._metrics
        metrics.generation_tokens.inc(count)
        if answer.last_token_time is None:
            metrics.time_to_first_token.observe(now - answer.request.arrival_time)
            self._count_prompt(answer, now)
            answer.last_token_time, count = now, count - 1
        for _ in range(count):  # tokens that came together share the time they took
            metrics.inter_token_latency.observe((now - answer.last_token_time) / count)
        answer.last_token_time = now

    def _count_prompt(self, answer: _AnswerState, now: float) -> None:
        if answer.index == 0:  # the n answers share one prompt
            self._metrics.prompt_tokens.inc(answer.request.num_prompt_tokens)
        started = answer.request.first_scheduled_time
        self._metrics.queue_time.observe((now if started is None else started) - answer.request.arrival_time)

    def _end(self, answer: _AnswerState, output: RequestOutput, now: float) -> None:
        del self._answers[answer.request.request_id]
        assert output.finish_reason is not None
        if output.finish_reason is FinishReason.LENGTH and answer.last_token_time is None:
            self._count_prompt(answer, now)  # max_tokens is 0
        self._metrics.requests_finished.labels(output.finish_reason.value).inc()
        self._metrics.e2e_latency.observe(now - answer.request.arrival_time)
