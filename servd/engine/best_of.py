"""The best n of more answers than were asked for: those with the highest log-probability per token.

Stands between the output processor and the caller's stream. Knows nothing of how answers come about.
"""

from __future__ import annotations

from servd.engine.result_stream import ResultStream
from servd.outputs import RequestOutput
from servd.sampling_params import SamplingParams


class BestOf:
    """Takes the news of `best_of` answers; the stream gets the best `n`, best first, when all have ended."""

    def __init__(self, stream: ResultStream, params: SamplingParams) -> None:
        """`params` are the caller's: log-probabilities they do not ask for are not passed on."""
        self._stream = stream
        self._params = params
        self._answers: dict[int, RequestOutput] = {}
        self._unfinished = params.num_sequences

    def put(self, output: RequestOutput) -> None:
        """Called by the engine: add news of one answer."""
        known = self._answers.get(output.index)
        if known is None:
            self._answers[output.index] = output
        else:
            known.merge(output)
        if output.finish_reason is not None:
            self._unfinished -= 1
            if self._unfinished == 0:
                self._finish()

    def _finish(self) -> None:
        first = self._answers[0]
        num_cached_tokens = first.num_cached_tokens  # the others begin in the first one's blocks
        ranked = sorted(self._answers.values(), key=_mean_logprob, reverse=True)
        for place, output in enumerate(ranked[: self._params.n]):
            output.index = place
            output.num_cached_tokens = num_cached_tokens
            if self._params.logprobs is None:
                output.logprobs = []
            self._stream.put(output)


def _mean_logprob(output: RequestOutput) -> float:
    if output.error is not None:
        return -float("inf")
    return sum(entry.logprob for entry in output.logprobs) / max(len(output.logprobs), 1)
